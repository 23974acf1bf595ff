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
