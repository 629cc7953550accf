//! What brings a machine to Omni: the join parameters of this moment, as user data or as part of the image.
//!
//! *Guarantees.* Rendered anew each time, since the token can rotate; kept nowhere. An image that holds them is another one after a
//! rotation.

use std::borrow::Cow;

use crate::cloud::{Cloud, CloudError, ErrorKind, UserData};
use crate::machine::desired::Desired;
use crate::omni::kinds::{GrpcTunnel, MachineRequestSpec};
use crate::talos::join::JoinParams;
use crate::talos::schematic::Schematic;
use crate::talos::{inline, patch};

use super::reconcile::{Engine, Pass};

fn fault(kind: ErrorKind, what: String) -> CloudError {
    CloudError::new("Omni", "render the join config", kind, what)
}

impl<C: Cloud> Engine<C> {
    /// The schematic of a request's image, with the join parameters where the platform knows no other way.
    pub(super) fn schematic<'a>(
        &self,
        desired: &'a Desired<C>,
        request: &MachineRequestSpec,
    ) -> Result<Cow<'a, Schematic>, CloudError> {
        if !desired.boot.joins_by_kernel_args() {
            return Ok(Cow::Borrowed(&desired.schematic));
        }
        let args = self
            .join_params(request, None)?
            .kernel_args()
            .map_err(|why| fault(ErrorKind::Unavailable, why.to_string()))?;
        let mut joined = request.clone();
        joined
            .kernel_args
            .extend(args.iter().map(|arg| arg.expose().to_owned()));
        if let Some(document) = patch::nameservers(&desired.nameservers) {
            let arg = inline::kernel_arg(&document).map_err(|why| fault(ErrorKind::Rejected, why))?;
            joined.kernel_args.push(arg);
        }
        let schematic =
            Schematic::new(&joined, &desired.boot).map_err(|why| fault(ErrorKind::Rejected, why))?;
        Ok(Cow::Owned(schematic))
    }

    /// The join documents, rendered now.
    pub(super) fn user_data(&self, pass: &Pass<'_, C>) -> Result<UserData, CloudError> {
        let (Some(request), Some(desired)) = (&pass.request, pass.desired()) else {
            return Err(fault(
                ErrorKind::Unexpected,
                "the request cannot be read".to_owned(),
            ));
        };
        let documents = self
            .join_params(&request.spec, Some(pass.key))?
            .documents()
            .map_err(|why| fault(ErrorKind::Unavailable, why.to_string()))?;
        let mut text = documents.expose().to_owned();
        if let Some(nameservers) = patch::nameservers(&desired.nameservers) {
            text.push_str("---\n");
            text.push_str(&nameservers);
        }
        if text.len() > C::LIMITS.user_data {
            let what = format!(
                "the user data has {} bytes, and {} takes {} at most",
                text.len(),
                C::KIND,
                C::LIMITS.user_data
            );
            return Err(fault(ErrorKind::Rejected, what));
        }
        Ok(UserData(text.into_bytes()))
    }

    /// The join parameters; `key` names the request where they are for one machine alone.
    fn join_params(&self, request: &MachineRequestSpec, key: Option<&str>) -> Result<JoinParams, CloudError> {
        let inputs = self
            .join
            .inputs()
            .map_err(|why| fault(ErrorKind::Unavailable, why))?;
        Ok(JoinParams {
            api_url: inputs.api_url,
            token: inputs.token,
            events_port: inputs.events_port,
            logs_port: inputs.logs_port,
            token_version: inputs.token_version,
            provider: self.identity.provider.clone(),
            request: key.map(str::to_owned),
            tunnel: request.grpc_tunnel == GrpcTunnel::Enabled,
        })
    }
}
