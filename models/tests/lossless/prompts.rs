//! Prompts: in stretches, and not again where they are known.

use super::*;

/// Requests of a group that come one by one, and other prompts that begin alike: what is known goes through the target once, and all
/// of it has the bits that it would have alone.
#[test]
fn prompts_that_went_through_the_target_lately_do_not_again() {
    for (seed, hidden) in [(4, Hidden::Last), (7, Hidden::Taps)] {
        let target = target(seed);
        let decoding = Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 20, eos: Vec::new(), stop: None, hidden };
        let decoder = |threads| Decoder::new(target.clone(), decoding.clone(), Arc::new(Pool::new(threads).unwrap()));
        let prompt = |length: u32, last: u32| -> Vec<u32> {
            (0..length).map(|i| if i + 1 < length { 1 + i * i % (VOCAB - 1) } else { last }).collect()
        };
        // The same again, one that differs in its last token only, longer and shorter ones, and one that is alike for less than a page.
        let prompts = [(101, 1), (101, 1), (101, 2), (108, 3), (70, 4), (65, 5), (60, 6), (101, 1)];
        let (mut together, mut ended, mut prefilled) = (decoder(2), Vec::new(), Vec::new());
        for (sample, (length, last)) in prompts.into_iter().enumerate() {
            let noise = NoiseKey::new(seed, 1, 0, 0, sample as u32);
            together.admit(0, &prompt(length, last), &[(sample, noise)]).unwrap();
            let mut rows = 0;
            while together.is_prefilling() {
                let cycle = together.cycle(None).unwrap();
                rows += cycle.prefilled;
                ended.extend(cycle.ended);
            }
            prefilled.push(rows);
        }
        while together.running() > 0 {
            ended.extend(together.cycle(None).unwrap().ended);
        }
        // All but the last token go through the target, and pages have 64.
        assert_eq!(prefilled, [100, 0, 0, 43, 5, 0, 59, 36], "four are kept");
        for answer in ended {
            let mut alone = decoder(1);
            alone.admit(0, &answer.tokens[..answer.prompt], &[(answer.sample, answer.noise)]).unwrap();
            let same = loop {
                if let Some(same) = alone.cycle(None).unwrap().ended.pop() {
                    break same;
                }
            };
            assert_same(
                std::slice::from_ref(&same),
                std::slice::from_ref(&answer),
                &format!("sample {}", answer.sample),
            );
            assert!(same.hidden.iter().map(|h| h.to_bits()).eq(answer.hidden.iter().map(|h| h.to_bits())));
        }
    }
}

/// Of requests of one group that come before their prompt has been through the target, it goes through once, too; and who was asked for
/// the longest ago is forgotten first.
#[test]
fn requests_join_a_prompt_on_its_way() {
    let target = target(4);
    let (temperature, top_p, tokens_max, hidden) = (1.0, 1.0, 20, Hidden::Last);
    let decoding = Decoding { temperature, top_p, tokens_max, eos: Vec::new(), stop: None, hidden };
    let mut decoder = Decoder::new(target, decoding, Arc::new(Pool::new(1).unwrap()));
    let rows = |decoder: &mut Decoder, first: u32, sample: usize| {
        let prompt: Vec<u32> = (0..101).map(|i| 1 + (first + i) % (VOCAB - 1)).collect();
        decoder.admit(0, &prompt, &[(sample, NoiseKey::new(4, 1, 0, first, sample as u32))]).unwrap();
        decoder.cycle(None).unwrap().prefilled
    };
    assert_eq!([rows(&mut decoder, 1, 0), rows(&mut decoder, 1, 1)], [64, 36], "the second one joins the first");
    assert_eq!(decoder.decoding(), 2);
    for first in [2, 3, 4] {
        assert_eq!([rows(&mut decoder, first, 0), decoder.cycle(None).unwrap().prefilled], [64, 36]);
    }
    assert_eq!(rows(&mut decoder, 1, 2), 0, "four are kept");
    assert_eq!([rows(&mut decoder, 5, 0), decoder.cycle(None).unwrap().prefilled], [64, 36]);
    assert_eq!([3, 4, 1, 5].map(|first| rows(&mut decoder, first, 3)), [0; 4]);
    assert_eq!(rows(&mut decoder, 2, 1), 64, "it was asked for the longest ago");
}

/// Where memory is limited, nobody overtakes who waits for it, and kept prompts give way to who needs their pages.
#[test]
fn prompts_are_kept_within_the_memory() {
    let target = target(6);
    let (temperature, top_p, tokens_max, hidden) = (1.0, 1.0, 20, Hidden::Last);
    let decoding = Decoding { temperature, top_p, tokens_max, eos: Vec::new(), stop: None, hidden };
    // Seven pages; a prompt of 101 tokens has two, and each request one more.
    let room = 7 * 64;
    let mut decoder = Decoder::new(target, decoding, Arc::new(Pool::new(1).unwrap())).with_cache_max(room);
    let admit = |decoder: &mut Decoder, group: u32, samples: usize| {
        let prompt: Vec<u32> = (0..101).map(|i| 1 + (group + i) % (VOCAB - 1)).collect();
        let noise = |sample| (sample, NoiseKey::new(6, 1, 0, group, sample as u32));
        decoder.admit(group as usize, &prompt, &(0..samples).map(noise).collect::<Vec<_>>()).unwrap();
    };
    let mut order = Vec::new();
    let mut finish = |decoder: &mut Decoder, prompts: usize| {
        let mut prefilled = 0;
        while decoder.running() > 0 {
            let cycle = decoder.cycle(None).unwrap();
            prefilled += cycle.prefilled;
            order.extend(cycle.ended.iter().map(|answer| answer.group));
            assert!(decoder.cached_tokens() <= room, "{} tokens", decoder.cached_tokens());
        }
        assert_eq!(prefilled, 100 * prompts);
    };
    admit(&mut decoder, 1, 1);
    finish(&mut decoder, 1);
    // The second one has no room beside the first, and the third, which is known, waits for its turn.
    admit(&mut decoder, 2, 2);
    admit(&mut decoder, 3, 3);
    admit(&mut decoder, 1, 1);
    finish(&mut decoder, 3);
    assert_eq!(order, [1, 2, 2, 3, 3, 3, 1]);
}

/// Prompts of several stretches, beside requests that decode: rows of prompts have the bits of a forward over the whole.
#[test]
fn long_prompts_enter_a_stretch_at_a_time() {
    long_prompts_keep(Hidden::Last);
    long_prompts_keep(Hidden::Taps);
}

fn long_prompts_keep(hidden: Hidden) {
    let target = target(4);
    let decoding = Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 24, eos: Vec::new(), stop: None, hidden };
    let mut decoder = Decoder::new(target.clone(), decoding, Arc::new(Pool::new(2).unwrap()));
    let (mut suffix, mut ended, mut seen) = (Suffix::new(1, 4), Vec::new(), Vec::new());
    for (group, length) in [3, 90, 1, 64, 65, 40].into_iter().enumerate() {
        let prompt: Vec<u32> = (0..length).map(|i| 1 + (i * i + group as u32) % (VOCAB - 1)).collect();
        let noise = |sample: usize| (sample, NoiseKey::new(8, 1, 0, group as u32, sample as u32));
        decoder.admit(group, &prompt, &[0, 1].map(noise)).unwrap();
        let cycle = decoder.cycle(Some((&mut suffix, &Strategy::chain(0, 3)))).unwrap();
        seen.push((cycle.prefilled, decoder.decoding()));
        ended.extend(cycle.ended);
    }
    assert_eq!(seen, [(2, 2), (64, 2), (25, 6), (63, 8), (64, 10), (39, 12)]);
    while decoder.running() > 0 {
        ended.extend(decoder.cycle(Some((&mut suffix, &Strategy::chain(0, 3)))).unwrap().ended);
    }
    assert_eq!(ended.len(), 12);
    for answer in ended {
        let whole = target.hidden_of_sequences(&Pool::default(), &[&answer.tokens[..answer.tokens.len() - 1]], hidden);
        assert!(
            answer.hidden.iter().map(|h| h.to_bits()).eq(whole.iter().map(|h| h.to_bits())),
            "group {}",
            answer.group
        );
    }
}
