//! A configuration's text: settings that read back to the same, or an error that says where.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use preforkd::internals::config::{self, Overrides};
use preforkd::internals::Error;

fuzz_target!(|text: &str| {
    // What it includes is whatever the machine has, and no matter of this text.
    if text.contains("include") {
        return;
    }
    let file = Path::new("/nonexistent/preforkd.toml");
    let overrides = Overrides::default();
    match config::load_text(file, text.to_owned(), &overrides) {
        Ok(settings) => {
            let again = settings.to_toml();
            let again = config::load_text(file, again, &overrides).expect("what check prints");
            assert_eq!(again, settings);
            assert!(config::keep_restart_only_keys(again, &settings).needs_restart.is_empty());
        }
        Err(error) => {
            let Error::Config { position, .. } = &error else {
                panic!("not of the configuration: {error}");
            };
            if let Some(position) = position {
                let lines = text.split('\n').count();
                assert!((1..=lines).contains(&position.line) && position.column > 0);
            }
            assert_eq!(error.exit_code(), 78);
            assert!(!error.to_string().is_empty());
        }
    }
});
