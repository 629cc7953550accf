//! Scripts that a seed once found, shortened by hand.

use std::time::Duration;

use omni_infra_provider::cloud::ErrorKind;

use super::Tally;
use super::script::Event::{self, Cloud, Kill, Omni, Request, Scale, TearDown};
use super::script::{CloudTrouble, OmniTrouble, Script};

#[track_caller]
fn play(daemons: usize, events: &[(u64, Event)]) {
    let script = Script {
        seed: 1,
        daemons,
        strangers: vec![("a", "stranger")],
        drain: Duration::from_secs(3),
        events: events
            .iter()
            .map(|(millis, event)| (Duration::from_millis(*millis), event.clone()))
            .collect(),
        respite: Duration::from_secs(400),
    };
    if let Err(why) = super::play(&script, &Tally::default()) {
        panic!("{why}");
    }
}

#[test]
fn a_daemon_does_not_conclude_from_a_look_that_is_older_than_the_other_ones_news() {
    // Both find nothing; one creates, starts and says so.
    let busy = CloudTrouble::Fails(ErrorKind::Busy);
    play(
        2,
        &[(0, Scale("w", 3)), (2_600, Cloud("create instance", busy, 1))],
    );
}

#[test]
fn a_wait_for_a_slow_import_is_no_spinning() {
    let slow = CloudTrouble::Slow(Duration::from_secs(300));
    play(1, &[(0, Cloud("import image", slow, 1)), (0, Scale("w", 2))]);
}

#[test]
fn a_creation_does_not_wait_out_a_rest_of_the_site_while_its_request_goes() {
    let after = Some(Duration::from_secs(200));
    let throttled = CloudTrouble::Fails(ErrorKind::Throttled { after });
    let late = OmniTrouble::SlowAnswer(Duration::from_secs(5));
    play(
        2,
        &[
            (0, Kill(1, Duration::from_millis(6_500))),
            (0, Request("s1", "")),
            (0, Request("s2", "")),
            // One has read Omni when the site is told to rest for the sake of the other.
            (4_900, Omni("get MachineRequestStatuses", late, 1)),
            (4_900, Cloud("create instance", throttled, 1)),
            (6_000, TearDown("s1")),
            (6_000, TearDown("s2")),
        ],
    );
}

#[test]
fn a_creation_is_not_sent_after_reads_that_are_old_by_now() {
    // The reads take as long as what a teardown waits for has over the longest creation.
    let late = OmniTrouble::SlowAnswer(Duration::from_secs(20));
    let slow = CloudTrouble::Slow(Duration::from_secs(75));
    play(
        2,
        &[
            (0, Kill(1, Duration::from_millis(6_500))),
            (0, Request("s1", "")),
            (4_900, Omni("get MachineRequestStatuses", late, 1)),
            (4_900, Cloud("create instance", slow, 1)),
            (6_000, TearDown("s1")),
        ],
    );
}
