//! Cuts the power of a recorded server at random points, and opens what a disk may hold then: each acknowledged job must
//! be there, and the store must be intact. PREFORKD_IMAGES sets the number of images.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::thread;

use serde_json::json;

use super::disk::{Disk, Image, LOG, NAMES, Record, any_loss};
use super::recording::{Recording, record};
use super::result;
use crate::support::{Daemon, Dice, Dir, alone, binary, from_environment};

/// The number of enqueues that are recorded, each with a commit of its own.
const COMMITS: usize = 200;

/// The number of threads that open images.
const THREADS: usize = 2;

/// A real server opens one image of this number, and more of a store that is just created.
const SERVED: usize = 200;

/// The records until a new store has its tables, at least.
const FIRST_PAGE: usize = 50;

/// Reads stores. It gets the sizes of all arrays, what was answered to clients, and paths of stores. It answers with the
/// number of jobs that are missing or in a wrong state, and with what else is wrong.
const READER: &str = r#"
import json, sqlite3, sys
STORED, CANCELLED, ENDED = range(3)
arrays = json.loads(sys.stdin.readline())
answers = {}
def read(store):
    store.execute("PRAGMA synchronous = OFF")
    said = store.execute("PRAGMA integrity_check(3)").fetchall()
    if said != [("ok",)]:
        return len(answers), str(said)
    if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'job'").fetchone():
        return len(answers), ""
    states = dict(store.execute("SELECT id, state FROM job"))
    expected = {STORED: range(5), CANCELLED: [4], ENDED: [2, 3, 4]}
    lost = sum(states.get(job) not in expected[kind] for job, kind in answers.items())
    unlike, = store.execute("SELECT count(*) FROM job WHERE (state = 0) <> (seq IN (SELECT seq FROM queue))").fetchone()
    strange, = store.execute("SELECT count(*) FROM queue WHERE seq NOT IN (SELECT seq FROM job)").fetchone()
    parts = store.execute("SELECT CAST(trim(params, '\"') AS INTEGER), count(*) FROM job WHERE params LIKE '%:%' GROUP BY 1").fetchall()
    torn = [array for array, count in parts if arrays[array] != count]
    wrong = f"{unlike} rows without each other, {strange} strange rows, parts of arrays: {torn}"
    return lost, wrong if unlike or strange or torn else ""
for line in sys.stdin:
    word, argument = line.split()
    if word != "open":
        for at in range(0, len(argument), 32):
            job = bytes.fromhex(argument[at:at + 32])
            answers[job] = max(int(word), answers.get(job, 0))
        continue
    store = sqlite3.connect(argument, timeout=1, isolation_level=None)
    try:
        found = read(store)
    except sqlite3.Error as error:
        found = len(answers), str(error)
    store.close()
    print(json.dumps(found), flush=True)
"#;

/// A Python that reads stores.
struct Reader {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Reader {
    fn start(arrays: &[usize]) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", READER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        writeln!(input, "{}", json!(arrays)).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Reader {
            child,
            input,
            output,
        }
    }

    /// From now on, these jobs must be there.
    fn answered(&mut self, kind: usize, jobs: &[[u8; 16]]) {
        let hex: String = jobs.concat().iter().map(|it| format!("{it:02x}")).collect();
        writeln!(self.input, "{kind} {hex}").unwrap();
    }

    /// Returns the number of lost jobs, and what else is wrong.
    fn read(&mut self, store: &Path) -> (u64, String) {
        writeln!(self.input, "open {}", store.display()).unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What was found in all images.
#[derive(Debug, Default)]
struct Findings {
    images: usize,
    /// Images without a job that was acknowledged before.
    losing: usize,
    lost: u64,
    corrupt: usize,
    /// What is wrong in the first images.
    first: Vec<String>,
    /// Whether the first wrong images are kept, because no seed repeats the recording.
    is_keeping: bool,
}

/// A place for images in memory, if there is one: their syncs cost nothing there.
fn place() -> Dir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => Dir::inside(memory),
        false => Dir::new(),
    }
}

/// Writes an image as the files of a store. Returns the path of the database.
fn write(image: &Image, dir: &Path) -> PathBuf {
    let _ = fs::remove_file(dir.join("jobs.db-shm"));
    for (name, content) in NAMES.iter().zip(image) {
        // Not the same file again, because SQLite knows the files of a process by their inodes.
        let _ = fs::remove_file(dir.join(name));
        if let Some(content) = content {
            fs::write(dir.join(name), content).unwrap();
        }
    }
    dir.join(NAMES[0])
}

/// Opens the store with a real server, and asks it for some jobs. Returns the number of those that it does not have.
fn serve(store: &Path, answered: &[[u8; 16]], dice: &mut Dice) -> u64 {
    let config = format!("[jobs]\nstore = \"sqlite:{}\"\n", store.display());
    let daemon = Daemon::builder().config(&config).start();
    daemon.wait_log("job store opened: ");
    let client = &mut daemon.client();
    let mut lost = 0;
    for _ in 0..20.min(answered.len()) {
        let job = u128::from_be_bytes(dice.pick(answered));
        let hex = format!("{job:032x}");
        let id = [
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..],
        ]
        .join("-");
        let answer = super::call(client, "rpc.job.get", &json!({"job": id}));
        lost += u64::from(answer["result"]["job"] != id);
    }
    result(client, "rpc.job.enqueue", &super::later(&json!("after")));
    lost
}

/// Opens images at these points of a recording, which are sorted.
fn open(recording: &Recording, points: &[usize], seed: usize, findings: &Mutex<Findings>) {
    let dir = place();
    let config = format!(
        "[jobs]\nstore = \"sqlite:{}\"\n",
        dir.join(NAMES[0]).display()
    );
    let config = dir.write("preforkd.toml", config);
    let mut reader = Reader::start(&recording.arrays);
    let mut disk = Disk::default();
    let mut answered = Vec::new();
    let mut records = recording.records.iter();
    let mut done = 0;
    for (number, point) in points.iter().enumerate() {
        for record in records.by_ref().take(point - done) {
            disk.apply(record);
            if let Record::Answer(kind, jobs) = record {
                reader.answered(*kind, jobs);
                answered.extend(jobs);
            }
        }
        done = *point;
        let dice = &mut Dice::new((seed ^ (point << 20) ^ number) as u64);
        let loss = any_loss(dice);
        let image = disk.after_power_loss(loss, dice);
        let store = write(&image, &dir);
        let mut check = Command::new(binary());
        let check = check.args(["job", "check", "--config"]).arg(&config);
        let check = check.output().unwrap();
        let mut wrong = match check.status.success() {
            true => String::new(),
            false => String::from_utf8_lossy(&check.stderr).into_owned(),
        };
        let mut lost = 0;
        let is_served = match *point < FIRST_PAGE {
            true => number % (SERVED / 20) == 0,
            false => number % SERVED == SERVED / 2,
        };
        if wrong.is_empty() && is_served {
            lost += serve(&store, &answered, dice);
        }
        let (unread, also_wrong) = reader.read(&store);
        lost = lost.max(unread);
        wrong.push_str(&also_wrong);
        let mut findings = findings.lock().unwrap();
        findings.images += 1;
        findings.lost += lost;
        findings.losing += usize::from(lost > 0);
        findings.corrupt += usize::from(!wrong.is_empty());
        if (lost > 0 || !wrong.is_empty()) && findings.first.len() < 5 {
            let text = format!(
                "record {point} of {}, {loss:?} lost: {lost} of {} jobs are missing. {wrong}",
                recording.records.len(),
                answered.len()
            );
            findings.first.push(text);
            if findings.is_keeping {
                let kept = Dir::new();
                write(&image, &kept);
                println!("kept for a look: {}", kept.display());
                std::mem::forget(kept);
            }
        }
    }
}

/// The records of the creation of a store, at least.
const CREATION: usize = 150;

/// Returns random points of a recording: half of them anywhere, the others near rare events. These are the creation of
/// the store, syncs, changed lengths and names, and the begin of a log.
fn points(records: &[Record], images: usize, dice: &mut Dice) -> Vec<usize> {
    let is_common = |it: &Record| match it {
        Record::Write(file, offset, _) => (*file, *offset) != (LOG, 0),
        Record::Answer(..) => true,
        _ => false,
    };
    let rare = records.iter().enumerate().filter(|(_, it)| !is_common(it));
    let rare: Vec<usize> = rare.map(|(number, _)| number).collect();
    let any = |_| match dice.roll(8) {
        // Mostly its first records.
        0 => {
            let last = 1 + dice.roll(CREATION);
            dice.roll(last)
        }
        1..4 => (dice.pick(&rare) + dice.roll(4)).min(records.len()),
        _ => dice.roll(records.len() + 1),
    };
    (0..images).map(any).collect()
}

/// Opens images of a recording at random points.
fn open_images(
    recording: &Recording,
    (images, is_keeping): (usize, bool),
    dice: &mut Dice,
) -> Findings {
    let mut points = points(&recording.records, images, dice);
    points.sort_unstable();
    let findings = Mutex::new(Findings {
        is_keeping,
        ..Findings::default()
    });
    let seed = dice.roll(usize::MAX);
    thread::scope(|scope| {
        for part in points.chunks(images.div_ceil(THREADS)) {
            let findings = &findings;
            scope.spawn(move || open(recording, part, seed, findings));
        }
    });
    let findings = findings.into_inner().unwrap();
    println!(
        "{} images of {} commits: {} lost (in {} images), {} corrupt",
        findings.images, recording.commits, findings.lost, findings.losing, findings.corrupt
    );
    for text in &findings.first {
        println!("  {text}");
    }
    findings
}

#[test]
#[ignore = "needs a C compiler and python3; tests/run runs it"]
fn no_acknowledged_job_is_lost_in_a_power_loss() {
    let _alone = alone();
    let images = from_environment("PREFORKD_IMAGES", 1_000) as usize;
    let mut dice = Dice::of_the_day("PREFORKD_SEED");
    let recording = record(COMMITS, Dice::new(dice.roll(usize::MAX) as u64));
    let findings = open_images(&recording, (images, true), &mut dice);
    assert_eq!((findings.lost, findings.corrupt), (0, 0));
    assert!(recording.is_killed_before_sync);
}

/// This proves that the test above can fail.
#[test]
#[ignore = "needs a C compiler and python3; tests/run runs it"]
fn a_disk_that_does_not_sync_the_log_loses_jobs() {
    let _alone = alone();
    let mut dice = Dice::of_the_day("PREFORKD_SEED");
    let mut recording = record(COMMITS, Dice::new(dice.roll(usize::MAX) as u64));
    let is_sync = |it: &Record| matches!(it, Record::Sync(LOG));
    recording.records.retain(|it| !is_sync(it));
    let findings = open_images(&recording, (100, false), &mut dice);
    assert!(findings.losing > 20, "{findings:?}");
}
