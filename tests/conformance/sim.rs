//! The simulated cloud: the reference semantics keep the laws as well.

use std::sync::Arc;

use omni_infra_provider::backends::sim::{Moment, Sim, SimClass, SimPace, Zone};
use omni_infra_provider::cloud::{CloudError, ErrorKind, ImageKey};

use super::{Door, Spec, conformance};

pub(crate) struct SimDoor {
    sim: Sim,
}

impl Door for SimDoor {
    type Cloud = Sim;

    async fn open() -> Option<Self> {
        let sim = Sim::new(SimPace::default());
        Some(Self { sim })
    }

    fn cloud(&self) -> &Sim {
        &self.sim
    }

    fn another(&self) -> Sim {
        self.sim.clone()
    }

    async fn refused(&self) -> Sim {
        let blind = Sim::new(SimPace::default());
        blind.set_blind(true);
        blind
    }

    async fn unreachable(&self) -> Sim {
        let sim = Sim::new(SimPace::default());
        sim.set_hook(Some(Arc::new(|call, moment| {
            Box::pin(async move {
                let error = || CloudError::new("sim", call.verb, ErrorKind::Unavailable, "as told");
                (moment == Moment::Before).then(error)
            })
        })));
        sim
    }

    fn class(&self) -> SimClass {
        SimClass::default()
    }

    fn impossible_classes(&self) -> Vec<SimClass> {
        Vec::new()
    }

    fn huge_classes(&self) -> Vec<SimClass> {
        Vec::new()
    }

    fn scopes(&self) -> [Zone; 2] {
        ["a", "b"].map(|zone| Zone(zone.to_owned()))
    }

    async fn plant_stranger(&self, name: &str) {
        self.sim.plant_foreign("a", name);
    }

    async fn remove_stranger(&self, name: &str) -> bool {
        let there = self.sim.instances().iter().any(|(_, found, _)| found == name);
        self.sim.vanish("a", name);
        there
    }

    async fn left(&self, name: &str) -> Vec<String> {
        let instances = self.sim.instances().into_iter().map(|(_, found, _)| found);
        let disks = self.sim.disks().into_iter().map(|(_, found)| found);
        instances.chain(disks).filter(|found| found == name).collect()
    }

    async fn assert_as_asked(&self, spec: &Spec<Self>) {
        assert_ne!(self.left(&spec.instance.name).await, [""; 0]);
    }

    async fn user_data(&self, name: &str) -> Option<Vec<u8>> {
        self.sim.user_data("a", name).map(|data| data.0)
    }

    async fn images(&self, _: &ImageKey) -> usize {
        self.sim.images()
    }
}

conformance!(SimDoor, tokio::test(start_paused = true));
