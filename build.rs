//! Compiles the minimal protos in `proto/` without a system `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["cosi.proto", "specs.proto", "management.proto"];
    for file in files {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    println!("cargo::rerun-if-changed=VERSION");

    // VERSION is the one version number; Cargo wants its own copy, so a difference must not go unnoticed.
    let version = std::fs::read_to_string("VERSION")?;
    let version = version.trim();
    if version != std::env::var("CARGO_PKG_VERSION")? {
        return Err(format!("VERSION says {version}, Cargo.toml says otherwise: make them equal").into());
    }

    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .build_server(std::env::var_os("CARGO_FEATURE_SANDBOX").is_some())
        .compile_fds(descriptors)?;
    Ok(())
}
