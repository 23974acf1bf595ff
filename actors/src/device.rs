//! One device: an actor that owns an engine. It passes commands on and reports back under its epoch; it never computes.

use ractor::{Actor, ActorProcessingErr, ActorRef};

use crate::engine::{Command, Engine, Report};
use crate::supervisor::Message;

/// What a device actor receives.
pub(crate) enum DeviceMessage {
    /// For its engine.
    Command(Command),
    /// From its engine.
    Report(Report),
}

/// Who a device is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) device: usize,
    pub(crate) epoch: u64,
    pub(crate) name: String,
    pub(crate) threads: usize,
    pub(crate) fault_at: Option<u64>,
}

pub(crate) struct DeviceActor;

pub(crate) struct Owned {
    identity: Identity,
    engine: Engine,
    supervisor: ActorRef<Message>,
}

impl Actor for DeviceActor {
    type Msg = DeviceMessage;
    type State = Owned;
    type Arguments = (Identity, ActorRef<Message>);

    async fn pre_start(
        &self,
        myself: ActorRef<DeviceMessage>,
        args: Self::Arguments,
    ) -> Result<Owned, ActorProcessingErr> {
        let (identity, supervisor) = args;
        // A report of an engine that outlives its actor goes nowhere.
        let report = move |report| drop(myself.cast(DeviceMessage::Report(report)));
        let engine = Engine::start(&identity.name, identity.threads, identity.fault_at, report)?;
        Ok(Owned { identity, engine, supervisor })
    }

    async fn handle(
        &self,
        _: ActorRef<DeviceMessage>,
        message: DeviceMessage,
        state: &mut Owned,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DeviceMessage::Command(command) => state.engine.send(command),
            DeviceMessage::Report(Report::Died { reason }) => return Err(reason.into()),
            DeviceMessage::Report(report) => {
                let Identity { device, epoch, .. } = state.identity;
                state.supervisor.cast(Message::Report { device, epoch, report })?;
            }
        }
        Ok(())
    }
}
