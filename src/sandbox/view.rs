//! Sees a sandbox as a person would: one row for each machine request, what it became on the rack, and what
//! is left of it.

use std::collections::BTreeMap;

use oxide::types::InstanceState;

use super::{PROJECT, Sandbox};
use crate::omni::kinds::{ConfigPatchRequests, MachineRequestStatuses, MachineRequests, Stage};
use crate::omni::resource::Phase;

/// One machine request, or an instance that has none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// The request's ID, which is the instance's name too.
    pub request: String,
    /// Whether Omni has such a request, and whether it is on its way out.
    pub phase: Option<Phase>,
    /// What the provider says.
    pub stage: Option<Stage>,
    /// Its status line; at FAILED its error.
    pub says: String,
    /// The instance's state on the rack.
    pub instance: Option<InstanceState>,
    /// Whether its machine joined Omni.
    pub joined: bool,
}

impl Row {
    /// Whether it is all that was asked for: provisioned, running and joined.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.phase == Some(Phase::Running)
            && self.stage == Some(Stage::Provisioned)
            && self.instance == Some(InstanceState::Running)
            && self.joined
    }

    fn stage(&self) -> &'static str {
        match (self.phase, self.stage) {
            (Some(Phase::TearingDown), _) => "tearing down",
            (_, None) => "-",
            (_, Some(Stage::Unknown)) => "unknown",
            (_, Some(Stage::Provisioning)) => "provisioning",
            (_, Some(Stage::Provisioned)) => "PROVISIONED",
            (_, Some(Stage::Failed)) => "FAILED",
        }
    }

    fn cells(&self) -> [String; 5] {
        [
            self.request.clone(),
            self.stage().to_owned(),
            self.instance
                .map_or_else(|| "-".to_owned(), |state| state.to_string()),
            if self.joined { "joined" } else { "-" }.to_owned(),
            self.says.clone(),
        ]
    }
}

/// Everything that there is, by name.
#[must_use]
pub fn rows(sandbox: &Sandbox) -> Vec<Row> {
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    if let Some(omni) = &sandbox.omni {
        for request in omni.list::<MachineRequests>(&sandbox.provider) {
            rows.entry(request.metadata.id).or_default().phase = Some(request.metadata.phase);
        }
        for status in omni.list::<MachineRequestStatuses>(&sandbox.provider) {
            let row = rows.entry(status.metadata.id).or_default();
            row.stage = Some(status.spec.stage);
            row.says = match status.spec.stage {
                Stage::Failed => status.spec.error,
                _ => status.spec.status,
            };
        }
    }
    for instance in sandbox.oxide.instances(PROJECT) {
        let row = rows.entry(instance.name.to_string()).or_default();
        row.instance = Some(instance.run_state);
        row.joined = sandbox
            .omni
            .as_ref()
            .is_some_and(|omni| omni.is_joined(&instance.id.to_string()));
    }
    rows.into_iter()
        .map(|(request, row)| Row { request, ..row })
        .collect()
}

/// The rows as lines of columns, under a line of headings.
#[must_use]
pub fn table(rows: &[Row]) -> Vec<String> {
    let headings = ["REQUEST", "STAGE", "INSTANCE", "MACHINE", "STATUS"].map(str::to_owned);
    let all: Vec<_> = std::iter::once(headings)
        .chain(rows.iter().map(Row::cells))
        .collect();
    let mut widths = [0; 5];
    for cells in &all {
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    all.iter()
        .map(|cells| {
            let padded = cells
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:width$}"));
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

/// One row as a line by itself, for where nothing can be drawn over.
#[must_use]
pub fn line(row: &Row) -> String {
    let [request, stage, instance, machine, says] = row.cells();
    let mut line = format!("{request}: {stage}, instance {instance}");
    if machine != "-" {
        line.push_str(", joined");
    }
    if !says.is_empty() {
        line.push_str(&format!(" ({says})"));
    }
    line
}

/// How much of everything there is.
#[must_use]
pub fn summary(sandbox: &Sandbox) -> String {
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    [
        count(sandbox.oxide.instances(PROJECT).len(), "instance"),
        count(sandbox.oxide.disks(PROJECT).len(), "disk"),
        count(sandbox.oxide.snapshots(PROJECT).len(), "snapshot"),
        count(sandbox.oxide.images(PROJECT).len(), "image"),
    ]
    .join(", ")
}

/// Whatever is there that should not outlive its machine: all but images.
#[must_use]
pub fn leftovers(sandbox: &Sandbox) -> Vec<String> {
    let mut left = Vec::new();
    if let Some(omni) = &sandbox.omni {
        let provider = &sandbox.provider;
        let requests = omni.list::<MachineRequests>(provider);
        left.extend(requests.iter().map(|it| format!("request {}", it.metadata.id)));
        let statuses = omni.list::<MachineRequestStatuses>(provider);
        left.extend(statuses.iter().map(|it| format!("status {}", it.metadata.id)));
        let patches = omni.list::<ConfigPatchRequests>(provider);
        left.extend(
            patches
                .iter()
                .map(|it| format!("config patch {}", it.metadata.id)),
        );
    }
    let instances = sandbox.oxide.instances(PROJECT);
    left.extend(instances.iter().map(|it| format!("instance {}", *it.name)));
    let disks = sandbox.oxide.disks(PROJECT);
    left.extend(disks.iter().map(|it| format!("disk {}", *it.name)));
    let snapshots = sandbox.oxide.snapshots(PROJECT);
    left.extend(snapshots.iter().map(|it| format!("snapshot {}", *it.name)));
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_columns_and_a_line_stands_alone() {
        let rows = [
            Row {
                request: "workers-a".to_owned(),
                phase: Some(Phase::Running),
                stage: Some(Stage::Provisioned),
                instance: Some(InstanceState::Running),
                joined: true,
                says: String::new(),
            },
            Row {
                request: "workers-bbb".to_owned(),
                phase: Some(Phase::Running),
                stage: Some(Stage::Provisioning),
                says: "importing image: 43 %".to_owned(),
                ..Row::default()
            },
        ];
        assert_eq!(
            table(&rows),
            [
                "REQUEST      STAGE         INSTANCE  MACHINE  STATUS",
                "workers-a    PROVISIONED   running   joined",
                "workers-bbb  provisioning  -         -        importing image: 43 %",
            ]
        );
        assert_eq!(line(&rows[0]), "workers-a: PROVISIONED, instance running, joined");
        assert_eq!(
            line(&rows[1]),
            "workers-bbb: provisioning, instance - (importing image: 43 %)"
        );
        assert!(rows[0].is_done() && !rows[1].is_done());
    }
}
