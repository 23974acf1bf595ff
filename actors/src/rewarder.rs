//! Scores groups while others still decode.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use models::Answer;
use models::data::Problem;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use state::algorithm::Outcome;
use state::reward::{self, correct, score};

use crate::job::Job;
use crate::rollout::Rollout;
use crate::supervisor::Message;

/// A reward of whoever embeds a run. It may be slow, as it has a thread of its own, but has to say the same of the same answer:
/// what is learned depends on it.
#[derive(Clone)]
pub struct OwnReward {
    /// Tells it from others.
    pub name: String,
    /// Added to the score of the plan's rewards, of which there may be none. Where it panics, the answer is not scored.
    pub score: Arc<dyn Fn(&reward::Answer<'_>) -> Outcome + Send + Sync>,
}

impl fmt::Debug for OwnReward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnReward").field("name", &self.name).finish_non_exhaustive()
    }
}

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
    /// Of the answer.
    pub(crate) text: String,
}

pub(crate) struct Rewarder;

#[derive(Clone)]
pub(crate) struct Scoring {
    job: Arc<Job>,
    own: Option<OwnReward>,
    supervisor: ActorRef<Message>,
}

impl Actor for Rewarder {
    type Msg = Score;
    type State = Scoring;
    type Arguments = (Arc<Job>, Option<OwnReward>, ActorRef<Message>);

    async fn pre_start(
        &self,
        _: ActorRef<Score>,
        (job, own, supervisor): Self::Arguments,
    ) -> Result<Scoring, ActorProcessingErr> {
        Ok(Scoring { job, own, supervisor })
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
        let whole = self.job.tokenizer.decode(tokens);
        let text = self.job.stop.as_ref().map_or(whole.as_str(), |stop| stop.before(&whole));
        let solution = problem.solution.as_deref().map(|text| self.job.dataset.attempt(text));
        let answer = reward::Answer {
            question: &problem.question,
            text: self.job.dataset.attempt(text),
            reference: &problem.answer,
            solution,
            tokens: tokens.len(),
            tokens_max: rollout.decoding.tokens_max,
            truncated: answer.truncated,
        };
        let rewards = &self.job.plan.rewards;
        Verdict { outcome: self.score(&answer), is_correct: correct(rewards, &answer), text: text.to_owned() }
    }

    fn score(&self, answer: &reward::Answer<'_>) -> Outcome {
        let rewards = &self.job.plan.rewards;
        let Some(own) = &self.own else { return score(rewards, answer) };
        let found = catch_unwind(AssertUnwindSafe(|| (own.score)(answer)));
        let found = match found {
            Ok(Outcome::Scored(score)) if !score.is_finite() => {
                Outcome::Failed(format!("the reward `{}` is {score}", own.name))
            }
            Ok(found) => found,
            Err(_) => Outcome::Failed(format!("the reward `{}` panicked", own.name)),
        };
        if rewards.is_empty() { found } else { score(rewards, answer).and(found) }
    }
}
