//! Collects the samples of each metric and writes them as Prometheus text.
//!
//! A metric without samples is left out, because the encoder refuses a family without series.

use prometheus::TextEncoder;
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};

use super::metric_table::{METRICS, MetricInfo, PREFIX};

/// What a histogram shows: the cumulative count of each bound in seconds, and the sum in seconds.
#[derive(Debug, Clone, Default)]
pub struct HistogramSample {
    pub buckets: Vec<(f64, u64)>,
    pub count: u64,
    pub sum: f64,
}

/// The samples of all metrics, by their place in the table.
#[derive(Debug)]
pub struct Families {
    samples: Vec<Vec<Metric>>,
}

impl Families {
    pub fn new() -> Self {
        Families {
            samples: vec![Vec::new(); METRICS.len()],
        }
    }

    /// Adds a sample of a counter or gauge. The values of the labels are in the order of the table.
    ///
    /// # Panics
    /// If the table has no such metric.
    pub fn add(&mut self, name: &str, labels: &[&str], value: f64) {
        let (info, samples) = self.of(name);
        let mut metric = Metric::from_label(pairs(info, labels));
        if info.kind == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        samples.push(metric);
    }

    /// Adds a sample of a histogram, with the values of its labels.
    ///
    /// # Panics
    /// If the table has no such metric.
    pub fn add_histogram(&mut self, name: &str, labels: &[&str], sample: &HistogramSample) {
        let (info, samples) = self.of(name);
        let bucket = |&(bound, count): &(f64, u64)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        };
        let mut histogram = Histogram::default();
        histogram.set_bucket(sample.buckets.iter().map(bucket).collect());
        histogram.set_sample_count(sample.count);
        histogram.set_sample_sum(sample.sum);
        let mut metric = Metric::from_label(pairs(info, labels));
        metric.set_histogram(histogram);
        samples.push(metric);
    }

    /// Returns the text (Prometheus text format 0.0.4).
    pub fn into_text(self) -> String {
        let families: Vec<MetricFamily> = METRICS
            .iter()
            .zip(self.samples)
            .filter(|(_, samples)| !samples.is_empty())
            .map(|(info, samples)| {
                let mut family = MetricFamily::default();
                family.set_name(format!("{PREFIX}{}", info.name));
                family.set_help(info.help.to_owned());
                family.set_field_type(info.kind);
                family.set_metric(samples);
                family
            })
            .collect();
        // The encoder refuses only families without a name or without samples.
        TextEncoder::new()
            .encode_to_string(&families)
            .unwrap_or_default()
    }

    fn of(&mut self, name: &str) -> (&'static MetricInfo, &mut Vec<Metric>) {
        let place = METRICS.iter().position(|info| info.name == name);
        let place = place.expect("the table has every exported metric");
        (&METRICS[place], &mut self.samples[place])
    }
}

fn pairs(info: &MetricInfo, values: &[&str]) -> Vec<LabelPair> {
    debug_assert_eq!(info.labels.len(), values.len(), "{}", info.name);
    let pair = |(name, value): (&&str, &&str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    info.labels.iter().zip(values).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_and_backslashes_of_labels_are_escaped() {
        let mut families = Families::new();
        families.add("pool_calls_queued", &["a\"b\\c\nd"], 3.0);
        let text = families.into_text();
        let sample = "preforkd_pool_calls_queued{pool=\"a\\\"b\\\\c\\nd\"} 3";
        assert_eq!(text.lines().nth(2), Some(sample));
    }
}
