//! One device: an actor that owns an engine. It passes commands on, and fails when its engine does; it never computes. What the engine
//! reports goes to the supervisor under its epoch.

use std::sync::Arc;

use ractor::{Actor, ActorProcessingErr, ActorRef};

use crate::engine::{Command, Engine, Fault, Pulse, Report};
use crate::supervisor::Message;

/// What a device actor receives.
pub(crate) enum DeviceMessage {
    /// For its engine.
    Command(Command),
    /// Its engine is gone.
    Died { reason: String },
}

/// Who a device is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) device: usize,
    pub(crate) epoch: u64,
    pub(crate) name: String,
    pub(crate) threads: usize,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) fault: Option<Fault>,
}

pub(crate) struct DeviceActor;

impl Actor for DeviceActor {
    type Msg = DeviceMessage;
    type State = Engine;
    type Arguments = (Identity, ActorRef<Message>);

    async fn pre_start(
        &self,
        myself: ActorRef<DeviceMessage>,
        args: Self::Arguments,
    ) -> Result<Engine, ActorProcessingErr> {
        let (identity, supervisor) = args;
        let Identity { device, epoch, name, threads, pulse, fault } = identity;
        let report = move |report| match report {
            // Of an engine that outlives its actor it goes nowhere.
            Report::Died { reason } => drop(myself.cast(DeviceMessage::Died { reason })),
            report => drop(supervisor.cast(Message::Report { device, epoch, report })),
        };
        Ok(Engine::start(&name, threads, (pulse, fault), report)?)
    }

    async fn handle(
        &self,
        _: ActorRef<DeviceMessage>,
        message: DeviceMessage,
        engine: &mut Engine,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DeviceMessage::Command(command) => engine.send(command),
            DeviceMessage::Died { reason } => return Err(reason.into()),
        }
        Ok(())
    }
}
