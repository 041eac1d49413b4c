#![allow(clippy::unwrap_used)]
use std::ffi::CString;

use super::*;
use crate::sys::process::Exit;
use std::fs::File;
use std::io::Read;

fn template(program: &str) -> SpawnTemplate {
    SpawnTemplate {
        program: CString::new(program).unwrap(),
        directory: c"/".into(),
        account: None,
        limits: ProcessLimits::default(),
        guard: false,
    }
}

/// Runs a shell with this script. Returns its output and how it ended.
fn shell(template: &SpawnTemplate, script: &str) -> (String, Exit) {
    let null = File::open("/dev/null").unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    let script = CString::new(script).unwrap();
    let stdio = Stdio {
        stdin: null.as_fd(),
        stdout: writer.as_fd(),
        stderr: writer.as_fd(),
        calls: None,
    };
    let arguments = [c"sh", c"-c", script.as_c_str()];
    let mut child = spawn(template, &arguments, &[c"ONLY=this"], stdio).unwrap();
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    (text, child.reap().unwrap().exit)
}

#[test]
fn a_child_has_its_own_group_and_default_signals_and_inherits_nothing() {
    super::super::signal::ignore(&[nix::sys::signal::Signal::SIGUSR1]);
    let script = "test \"$(cut -d' ' -f5 /proc/$$/stat)\" = $$ && echo leads
        cat /proc/$$/environ; ls /proc/$$/fd; umask; pwd; exit 7";
    let (text, exit) = shell(&template("/bin/sh"), script);
    let text = text.replace('\0', " ");
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(exit, Exit::Code(7), "{text}");
    let expected = ["leads", "ONLY=this", "0", "1", "2", "0022", "/"];
    assert_eq!(words, expected, "{text}");
    // Use exec, because a shell blocks signals while it starts another program.
    let script = "exec grep -E '^Sig(Blk|Ign)' /proc/self/status";
    let (text, _) = shell(&template("/bin/sh"), script);
    let none = "0000000000000000";
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words, ["SigBlk:", none, "SigIgn:", none]);
}

#[test]
fn a_failure_before_exec_is_reported_and_leaves_no_child() {
    let null = File::open("/dev/null").unwrap();
    let stdio = Stdio {
        stdin: null.as_fd(),
        stdout: null.as_fd(),
        stderr: null.as_fd(),
        calls: None,
    };
    let missing = spawn(&template("/no/such"), &[c"x"], &[], stdio).unwrap_err();
    assert_eq!(
        (missing.step, missing.errno),
        (SpawnStep::Execute, Errno::ENOENT)
    );
    let nowhere = SpawnTemplate {
        directory: c"/no/such".into(),
        ..template("/bin/sh")
    };
    let error = spawn(&nowhere, &[c"x"], &[], stdio).unwrap_err();
    assert_eq!(
        (error.step, error.errno),
        (SpawnStep::Directory, Errno::ENOENT)
    );
    assert_eq!(
        error.to_string(),
        "it could not enter its directory: No such file or directory"
    );
}

#[test]
fn limits_apply_to_the_child_only() {
    let limited = SpawnTemplate {
        limits: ProcessLimits {
            cpu_seconds: Some(3),
            memory: Some(1 << 30),
            files: Some(32),
            processes: None,
        },
        ..template("/bin/sh")
    };
    let before = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let (text, _) = shell(&limited, "ulimit -St; ulimit -Ht; ulimit -v; ulimit -n");
    assert_eq!(text, "3\n4\n1048576\n32\n");
    let after = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    assert_eq!(before, after);
}

#[test]
fn a_dropped_child_is_gone_with_its_group() {
    let null = File::open("/dev/null").unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    let stdio = Stdio {
        stdin: null.as_fd(),
        stdout: writer.as_fd(),
        stderr: null.as_fd(),
        calls: None,
    };
    let arguments = [c"sh", c"-c", c"trap '' TERM; sleep 600 & sleep 600"];
    let child = spawn(&template("/bin/sh"), &arguments, &[], stdio).unwrap();
    let pid = child.pid();
    assert!(is_child(pid));
    drop(writer);
    drop(child);
    assert!(!is_child(pid));
    // The pipe ends when no process holds it any more, including the second sleep.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guarded_child_cannot_read_this_process_but_others_can() {
    let script = "readlink /proc/$PPID/exe >/dev/null 2>&1 && echo opened
        exec grep NoNewPrivs /proc/self/status";
    let free = template("/bin/sh");
    let own = u8::from(guard::has_no_new_privs());
    let (text, _) = shell(&free, script);
    assert_eq!(text, format!("opened\nNoNewPrivs:\t{own}\n"));
    let guarded = SpawnTemplate {
        guard: true,
        ..free
    };
    // If the kernel has no guard, the result is the same as without one.
    let expected = match guard::missing() {
        Some(_) => text,
        None => "NoNewPrivs:\t1\n".to_owned(),
    };
    // Run it twice, because the rule set is reused.
    for _ in 0..2 {
        let (text, exit) = shell(&guarded, script);
        assert_eq!((text, exit), (expected.clone(), Exit::Code(0)));
    }
}
