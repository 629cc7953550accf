//! The generated messages and services of `proto/`.
#![expect(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
#![cfg_attr(
    feature = "sandbox",
    expect(clippy::allow_attributes, reason = "generated code, of servers alone")
)]

/// Package `cosi.resource`.
pub mod cosi {
    tonic::include_proto!("cosi.resource");
}

/// Package `specs`.
pub mod specs {
    tonic::include_proto!("specs");
}

/// Package `management`.
pub mod management {
    tonic::include_proto!("management");
}
