use super::*;

fn cycle(requests: usize, prefilled: usize) -> CycleStats {
    let (at_s, seconds, draft_s, target_s, tokens, promised, drafted, strategy) = Default::default();
    let rows = requests + prefilled;
    CycleStats { at_s, seconds, draft_s, target_s, requests, rows, prefilled, tokens, promised, drafted, strategy }
}

#[test]
fn forwards_of_prompts_alone_are_not_counted() {
    let cycles = vec![cycle(0, 64), cycle(0, 7), cycle(1, 0), cycle(1, 9), cycle(2, 0)];
    let decoded = Decoded { cycles, ..Decoded::default() };
    assert_eq!(decoded.forwards(), 3);
}
