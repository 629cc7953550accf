//! What the guard around every cloud promises.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use omni_infra_provider::backends::sim::{Moment, Sim, SimClass, SimPace, Zone};
use omni_infra_provider::cloud::{
    Cloud, ErrorKind, Guarded, ImageRef, InstanceRef, InstanceSpec, Mark, UserData,
};

fn instance() -> InstanceRef<Zone> {
    InstanceRef {
        scope: Zone("a".to_owned()),
        name: "web".to_owned(),
        id: None,
        mark: Mark {
            provider: "sim".to_owned(),
            request: "web".to_owned(),
            installation: "one".to_owned(),
        },
        adopt_bare: true,
    }
}

#[tokio::test(start_paused = true)]
async fn a_creation_whose_turn_comes_too_late_is_never_begun() {
    let sim = Sim::new(SimPace::default());
    let begun = Arc::new(Mutex::new(Vec::new()));
    let calls = begun.clone();
    sim.set_hook(Some(Arc::new(move |call, moment| {
        if moment == Moment::Before {
            calls.lock().unwrap().push(call.verb);
        }
        // The look holds the one permit until its own deadline, a minute.
        Box::pin(async move {
            if call.verb == "find instance" {
                std::future::pending::<()>().await;
            }
            None
        })
    })));
    let guarded = Guarded::new(sim, 1, Duration::from_secs(30));
    let spec = InstanceSpec {
        instance: instance(),
        class: SimClass::default(),
        image: ImageRef {
            id: "image".to_owned(),
            name: "image".to_owned(),
        },
        user_data: UserData(Vec::new()),
    };
    let look = instance();
    let (looked, created) = tokio::join!(guarded.find_instance(&look), guarded.create_instance(&spec));
    assert_eq!(looked.unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(created.unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(*begun.lock().unwrap(), ["find instance"]);
}
