//! Scores groups while others still decode.

use std::sync::Arc;

use models::Answer;
use models::data::Problem;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use state::algorithm::Outcome;
use state::reward::{self, correct, score};

use crate::job::Job;
use crate::rollout::Rollout;
use crate::supervisor::Message;

/// A group to score.
pub(crate) struct Score {
    pub(crate) rollout: Arc<Rollout>,
    pub(crate) group: usize,
}

/// What the rewards say of one answer.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    pub(crate) outcome: Outcome,
    pub(crate) is_correct: bool,
}

pub(crate) struct Rewarder;

#[derive(Clone)]
pub(crate) struct Scoring {
    job: Arc<Job>,
    supervisor: ActorRef<Message>,
}

impl Actor for Rewarder {
    type Msg = Score;
    type State = Scoring;
    type Arguments = (Arc<Job>, ActorRef<Message>);

    async fn pre_start(
        &self,
        _: ActorRef<Score>,
        (job, supervisor): Self::Arguments,
    ) -> Result<Scoring, ActorProcessingErr> {
        Ok(Scoring { job, supervisor })
    }

    async fn handle(&self, _: ActorRef<Score>, message: Score, state: &mut Scoring) -> Result<(), ActorProcessingErr> {
        let (number, group, scoring) = (message.rollout.number, message.group, state.clone());
        // A slow reward would hold one of the runtime's few threads.
        let verdicts = tokio::task::spawn_blocking(move || scoring.judge_all(&message)).await?;
        state.supervisor.cast(Message::Scored { rollout: number, group, verdicts })?;
        Ok(())
    }
}

impl Scoring {
    fn judge_all(&self, Score { rollout, group }: &Score) -> Vec<Verdict> {
        let problem = &rollout.groups[*group].problem;
        rollout.answers(*group).iter().map(|answer| self.judge(answer, problem, rollout)).collect()
    }

    fn judge(&self, answer: &Answer, problem: &Problem, rollout: &Rollout) -> Verdict {
        let tokens = &answer.tokens[answer.prompt..];
        let text = self.job.tokenizer.decode(tokens);
        let text = self.job.stop.as_ref().map_or(text.as_str(), |stop| stop.before(&text));
        let solution = problem.solution.as_deref().map(|text| self.job.dataset.attempt(text));
        let answer = reward::Answer {
            text: self.job.dataset.attempt(text),
            reference: &problem.answer,
            solution,
            tokens: tokens.len(),
            tokens_max: rollout.decoding.tokens_max,
            truncated: answer.truncated,
        };
        let rewards = &self.job.plan.rewards;
        Verdict { outcome: score(rewards, &answer), is_correct: correct(rewards, &answer) }
    }
}
