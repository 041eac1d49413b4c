//! The `preforkd` command: the library's server with no method of its own.

fn main() {
    let mut file = None;
    let mut args = std::env::args().skip(1);
    let mut o = preforkd::config::Overrides::default();
    while let Some(a) = args.next() {
        if a == "--config" {
            file = args.next().map(Into::into);
        }
        if a == "--daemon" {
            o.daemon = true;
        }
    }
    if let Err(e) = preforkd::Server::new().serve(file, o) {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "{e}");
        std::process::exit(e.exit_code().into());
    }
}
