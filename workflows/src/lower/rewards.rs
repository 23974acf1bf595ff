//! Rewards: markers that suit the data.

use state::plan::{Reward, WeightedReward};

use super::check::Check;
use crate::spec;

pub(super) fn lower(check: &mut Check<'_>, rewards: Option<&[spec::Reward]>, data: &spec::Data) -> Vec<WeightedReward> {
    let Some(rewards) = rewards else { return vec![standard(data)] };
    rewards.iter().enumerate().map(|(index, reward)| one(check, &format!("rewards[{index}]"), reward, data)).collect()
}

/// The reward of a file that names none.
fn standard(data: &spec::Data) -> WeightedReward {
    let marker = marker(data).to_owned();
    let reward = match data {
        spec::Data::Chains(_) => Reward::Exact { marker },
        spec::Data::Jsonl(_) => Reward::Numeric { marker },
    };
    WeightedReward { reward, weight: 1.0 }
}

/// What stands before the final answer in the data.
fn marker(data: &spec::Data) -> &'static str {
    match data {
        spec::Data::Chains(_) => "#",
        spec::Data::Jsonl(_) => "####",
    }
}

/// What stands between two steps of a worked solution in the data.
fn separator(data: &spec::Data) -> &'static str {
    match data {
        spec::Data::Chains(_) => ";",
        spec::Data::Jsonl(_) => "\n",
    }
}

fn one(check: &mut Check<'_>, path: &str, reward: &spec::Reward, data: &spec::Data) -> WeightedReward {
    let text = |marked: &spec::Marked| marked.marker.clone().unwrap_or_else(|| marker(data).to_owned());
    let (lowered, weight) = match reward {
        spec::Reward::Exact(marked) => (Reward::Exact { marker: text(marked) }, marked.weight),
        spec::Reward::Numeric(marked) => (Reward::Numeric { marker: text(marked) }, marked.weight),
        spec::Reward::Format(marked) => (Reward::Format { marker: text(marked) }, marked.weight),
        spec::Reward::Steps(steps) => {
            let separator = steps.separator.clone().unwrap_or_else(|| separator(data).to_owned());
            (Reward::Steps { separator }, steps.weight)
        }
        spec::Reward::Length(length) => (Reward::Length, length.weight),
    };
    let is_good = weight.is_finite() && weight != 0.0;
    check.range(
        &format!("{path}.weight"),
        weight,
        is_good,
        "a number other than 0",
        "write `weight: 1.0`, or remove the reward",
    );
    if matches!(&lowered, Reward::Format { marker } if marker.is_empty()) {
        let message = "`Format` looks for a marker, and this one is empty";
        check.wrong(
            "workflow::marker",
            &format!("{path}.marker"),
            message,
            format!("write `marker: \"{}\"`", marker(data)),
        );
    }
    if matches!(&lowered, Reward::Steps { separator } if separator.is_empty()) {
        let message = "`Steps` splits solutions at a separator, and this one is empty";
        check.wrong(
            "workflow::separator",
            &format!("{path}.separator"),
            message,
            format!("write `separator: {:?}`", separator(data)),
        );
    }
    WeightedReward { reward: lowered, weight }
}
