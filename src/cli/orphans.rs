//! `orphans`: which instances carry this provider's mark, and no machine request wants them?

use std::process::ExitCode;

use super::{block_on, complain, failure, print, run};
use crate::config::setting::Flags;
use crate::daemon::{self, OrphanRow};
use crate::telemetry;

pub(super) fn orphans(flags: &Flags) -> ExitCode {
    let loaded = match run::load(flags) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    telemetry::init(&loaded.config.log);
    match block_on(daemon::orphans(&loaded.config)) {
        Ok(Ok(list)) => {
            if !list.rows.is_empty() {
                print(table(&list.rows));
            }
            match list.omni {
                Err(why) => return failure(&why),
                Ok(()) if list.rows.is_empty() => complain(
                    "nothing is orphaned: a machine request wants every instance that carries this provider's mark",
                ),
                Ok(()) => {}
            }
            ExitCode::SUCCESS
        }
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&anyhow::Error::new(error).context("cannot start the runtime")),
    }
}

fn table(rows: &[OrphanRow]) -> String {
    let lines: Vec<[String; 5]> = rows
        .iter()
        .map(|row| {
            [
                row.scope.clone(),
                row.name.clone(),
                row.id.clone().unwrap_or_else(|| "leftovers".to_owned()),
                row.request.clone().unwrap_or_else(|| "-".to_owned()),
                row.verdict.map_or_else(
                    || "Omni could not be asked".to_owned(),
                    |verdict| verdict.to_string(),
                ),
            ]
        })
        .collect();
    let head = ["SCOPE", "INSTANCE", "ID", "REQUEST", "WHY"].map(str::to_owned);
    let mut text = String::new();
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            let cells = std::iter::once(&head)
                .chain(&lines)
                .filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        })
        .collect();
    for line in std::iter::once(&head).chain(&lines) {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text += cells.join("   ").trim_end();
        text.push('\n');
    }
    text
}
