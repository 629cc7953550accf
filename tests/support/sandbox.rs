//! The sandbox as a person runs it: a process of its own, that ends with the test.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// A guard against hanging, generous because builds may run beside.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running sandbox.
pub(crate) struct Sandbox {
    _child: Child,
    variables: BTreeMap<String, String>,
    admin: String,
}

impl Sandbox {
    /// Starts one on free ports, and waits until it serves.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        let ports = ["omni", "oxide", "factory", "admin"].map(|server| format!("--{server}-port=0"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_omni-infra-provider"))
            .arg("sandbox")
            .args(ports)
            .args(arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut variables, mut admin) = (BTreeMap::new(), None);
        // The last line of its greeting says how it ends.
        let greeting = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some((name, value)) = line
                    .strip_prefix("export ")
                    .and_then(|export| export.split_once('='))
                {
                    variables.insert(name.to_owned(), value.to_owned());
                }
                if let Some((_, address)) = line.split_once("--address ") {
                    admin = Some(address.to_owned());
                }
                if line.contains("Ctrl-C") {
                    return true;
                }
            }
            false
        };
        assert_eq!(
            timeout(PATIENCE, greeting).await,
            Ok(true),
            "the sandbox's greeting"
        );
        Self {
            _child: child,
            variables,
            admin: admin.unwrap(),
        }
    }

    /// A variable of what it says to export.
    pub(crate) fn variable(&self, name: &str) -> &str {
        self.variables
            .get(name)
            .unwrap_or_else(|| panic!("the sandbox exports no {name}"))
    }

    /// Sets how many machines a set has.
    pub(crate) fn scale(&self, set: &str, machines: u32) {
        self.ask(&["scale", set, &machines.to_string()]);
    }

    /// Its table of requests, and what there is on its rack.
    pub(crate) fn status(&self) -> String {
        self.ask(&["status"])
    }

    /// Waits for a condition of its table.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        loop {
            let status = self.status();
            if condition(&status) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "never came: {what}\n{status}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn ask(&self, command: &[&str]) -> String {
        let arguments = [&["sandbox"], command, &["--address", &self.admin]].concat();
        let (code, output, errors) = crate::command_line::run(&arguments, &[], "");
        assert_eq!(code, Some(0), "{command:?}: {errors}");
        output
    }
}
