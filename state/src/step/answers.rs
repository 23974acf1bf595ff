//! Where the answers of a step are, counted as they move: a step may have tens of thousands.

use super::{RequestId, Size};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Waiting,
    Held { device: usize },
    Ended,
}

#[derive(Debug, Clone)]
pub(super) struct Answers {
    samples: usize,
    /// By group, then sample.
    places: Vec<Place>,
    /// By device.
    held: Vec<usize>,
    waiting: usize,
    /// None before this one waits.
    first_waiting: usize,
    /// Of each group, those that have not ended.
    open: Vec<usize>,
}

impl Answers {
    /// All of them wait.
    pub(super) fn new(Size { groups, samples, devices, .. }: Size) -> Self {
        let count = groups * samples;
        let (places, held, open) = (vec![Place::Waiting; count], vec![0; devices], vec![samples; groups]);
        Self { samples, places, held, waiting: count, first_waiting: 0, open }
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(super) fn held(&self, device: usize) -> usize {
        self.held[device]
    }

    pub(super) fn are_ended(&self, group: usize) -> bool {
        self.open[group] == 0
    }

    pub(super) fn place(&self, answer: RequestId) -> Place {
        self.places[self.index(answer)]
    }

    pub(super) fn put(&mut self, answer: RequestId, place: Place) {
        self.put_at(self.index(answer), place);
    }

    /// The first group of which answers wait, and which of its samples.
    pub(super) fn first_waiting(&mut self) -> Option<(usize, Vec<usize>)> {
        if self.waiting == 0 {
            return None;
        }
        self.first_waiting += self.places[self.first_waiting..].iter().position(|place| *place == Place::Waiting)?;
        let group = self.first_waiting / self.samples;
        let places = self.places[group * self.samples..][..self.samples].iter().enumerate();
        Some((group, places.filter(|(_, place)| **place == Place::Waiting).map(|(sample, _)| sample).collect()))
    }

    /// What a device held waits again.
    pub(super) fn vacate(&mut self, device: usize) {
        for index in 0..self.places.len() {
            if self.places[index] == (Place::Held { device }) {
                self.put_at(index, Place::Waiting);
            }
        }
    }

    /// Counts all anew.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let count = |place: Place| self.places.iter().filter(|at| **at == place).count();
        let held: Vec<usize> = (0..self.held.len()).map(|device| count(Place::Held { device })).collect();
        let open = |group: &[Place]| group.iter().filter(|at| **at != Place::Ended).count();
        let open: Vec<usize> = self.places.chunks(self.samples).map(open).collect();
        assert_eq!((&held, self.waiting, &open), (&self.held, count(Place::Waiting), &self.open));
        assert!(self.places[..self.first_waiting].iter().all(|at| *at != Place::Waiting));
    }

    fn index(&self, RequestId { group, sample }: RequestId) -> usize {
        assert!(sample < self.samples, "sample {sample} of {}", self.samples);
        group * self.samples + sample
    }

    fn put_at(&mut self, index: usize, place: Place) {
        let group = index / self.samples;
        match std::mem::replace(&mut self.places[index], place) {
            Place::Waiting => self.waiting -= 1,
            Place::Held { device } => self.held[device] -= 1,
            Place::Ended => self.open[group] += 1,
        }
        match place {
            Place::Waiting => {
                self.waiting += 1;
                self.first_waiting = self.first_waiting.min(index);
            }
            Place::Held { device } => self.held[device] += 1,
            Place::Ended => self.open[group] -= 1,
        }
    }
}
