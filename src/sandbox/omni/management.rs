//! Omni's management service, as far as a provider may call it: schematics, and where their boot assets are.

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

use super::Rpc;
use super::access::Role;
use super::service::{Intent, Service};
use super::signature::Actor;
use crate::omni::wire::management::{
    BootAssetKind, BootAssetUrlRequest, BootAssetUrlResponse, CreateSchematicFromRawRequest,
    CreateSchematicResponse, management_service_server::ManagementService,
};

/// A schematic, to refuse what the image factory would refuse: unknown keys, wrong types.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "read to be checked alone")]
struct Schematic {
    #[serde(default)]
    owner: Option<String>,
    #[serde(default)]
    overlay: Option<Overlay>,
    #[serde(default)]
    customization: Option<Customization>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "read to be checked alone")]
struct Overlay {
    #[serde(default)]
    image: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    options: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[expect(dead_code, reason = "read to be checked alone")]
struct Customization {
    #[serde(default)]
    embedded_machine_configuration: Option<String>,
    #[serde(default)]
    extra_kernel_args: Vec<String>,
    #[serde(default)]
    meta: Vec<MetaValue>,
    #[serde(default)]
    system_extensions: Option<SystemExtensions>,
    #[serde(default)]
    bootloader: Option<String>,
    #[serde(default)]
    secureboot: Option<Secureboot>,
    #[serde(default)]
    disk_image: Option<DiskImage>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "read to be checked alone")]
struct MetaValue {
    key: u8,
    value: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[expect(dead_code, reason = "read to be checked alone")]
struct SystemExtensions {
    #[serde(default)]
    official_extensions: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[expect(dead_code, reason = "read to be checked alone")]
struct Secureboot {
    #[serde(default)]
    enroll_keys: Option<String>,
    #[serde(default)]
    include_well_known_certificates: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[expect(dead_code, reason = "read to be checked alone")]
struct DiskImage {
    #[serde(default)]
    sector_size: Option<u32>,
}

/// The ID of a schematic whose text is canonical already.
fn schematic_id(raw: &[u8]) -> Result<String, Status> {
    let text = std::str::from_utf8(raw).map_err(|error| Status::unknown(error.to_string()))?;
    if !text.trim().is_empty() {
        let _: Schematic = serde_saphyr::from_str(text)
            .map_err(|error| Status::unknown(format!("failed to unmarshal schematic: {error}")))?;
    }
    Ok(hex::encode(Sha256::digest(raw)))
}

fn may_manage(actor: &Actor) -> Result<(), Status> {
    if matches!(actor.role, Role::InfraProvider | Role::Operator | Role::Admin) {
        return Ok(());
    }
    Err(Status::permission_denied(format!(
        "unauthorized: role {:?} is not one of the allowed roles [InfraProvider Operator Admin]",
        actor.role.name()
    )))
}

/// Whether a part of a URL's path is one.
fn segment(what: &str, text: &str) -> Result<(), Status> {
    let fine = !text.is_empty()
        && text != "."
        && text != ".."
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if fine {
        Ok(())
    } else {
        Err(Status::invalid_argument(format!("invalid {what} {text:?}")))
    }
}

fn asset_path(request: &BootAssetUrlRequest) -> Result<String, Status> {
    segment("schematic ID", &request.schematic_id)?;
    segment("platform", &request.platform)?;
    segment("architecture", &request.architecture)?;
    let version = request
        .talos_version
        .strip_prefix('v')
        .unwrap_or(&request.talos_version);
    segment("Talos version", version)?;
    let file = match request.boot_asset_kind() {
        BootAssetKind::Disk => {
            segment("format", &request.format)?;
            request.format.clone()
        }
        BootAssetKind::Iso => "iso".to_owned(),
        BootAssetKind::Pxe | BootAssetKind::Unset => {
            return Err(Status::invalid_argument("unsupported boot asset kind"));
        }
    };
    let secure = if request.secure_boot { "-secureboot" } else { "" };
    Ok(format!(
        "{}/v{version}/{}-{}{secure}.{file}",
        request.schematic_id, request.platform, request.architecture
    ))
}

#[tonic::async_trait]
impl ManagementService for Service {
    async fn create_schematic_from_raw(
        &self,
        request: Request<CreateSchematicFromRawRequest>,
    ) -> Result<Response<CreateSchematicResponse>, Status> {
        if !self.omni.with(|inner| inner.options.create_schematic) {
            return Err(Status::unimplemented(
                "unknown method CreateSchematicFromRaw for service management.ManagementService",
            ));
        }
        let actor = self.actor(
            request.metadata(),
            "/management.ManagementService/CreateSchematicFromRaw",
        )?;
        let raw = request.into_inner().raw_schematic;
        let id = schematic_id(&raw);
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::CreateSchematic,
                namespace: String::new(),
                kind: String::new(),
                id: id.clone().unwrap_or_default(),
            },
            |_| String::new(),
        );
        let schematic_id = self
            .act(call, |inner| {
                may_manage(&actor)?;
                let id = id?;
                inner.schematics.insert(id.clone(), raw.into());
                inner.bump();
                Ok(id)
            })
            .await?;
        Ok(Response::new(CreateSchematicResponse { schematic_id }))
    }

    async fn get_boot_asset_url(
        &self,
        request: Request<BootAssetUrlRequest>,
    ) -> Result<Response<BootAssetUrlResponse>, Status> {
        let Some(base) = self.omni.with(|inner| inner.options.boot_asset_base_url.clone()) else {
            return Err(Status::unimplemented(
                "unknown method GetBootAssetURL for service management.ManagementService",
            ));
        };
        let actor = self.actor(
            request.metadata(),
            "/management.ManagementService/GetBootAssetURL",
        )?;
        let request = request.into_inner();
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::BootAsset,
                namespace: String::new(),
                kind: String::new(),
                id: request.schematic_id.clone(),
            },
            |_| String::new(),
        );
        let path = self
            .act(call, |_| {
                may_manage(&actor)?;
                asset_path(&request)
            })
            .await?;
        let base = base.trim_end_matches('/');
        let host = base.split("://").last().unwrap_or(base).to_owned();
        Ok(Response::new(BootAssetUrlResponse {
            url: format!("{base}/image/{path}"),
            headers: std::collections::HashMap::new(),
            image_factory_host: host,
            storage_key: path,
        }))
    }
}
