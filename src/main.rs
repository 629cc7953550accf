//! Arguments in, exit code out.

fn main() -> std::process::ExitCode {
    omni_infra_provider::cli::main()
}
