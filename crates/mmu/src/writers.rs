//! For each page of guest memory: the linear pages through which some context may write it. When the
//! page becomes a table or code, exactly these write tags go.

use smallvec::SmallVec;
use umbra_memory::RamOffset;

/// Linear pages remembered for one frame; one more makes room by dropping all of them.
const PER_FRAME: usize = 8;
/// Bound on remembered pairs of frame and linear page.
const MAX_NODES: usize = 1 << 20;

struct Node {
    page: u64,
    roots: u64,
    next: u32,
}

/// A linear page and the root slots (a bit each) whose contexts may hold it.
pub(crate) type Writer = (u64, u64);

/// What the caller has to do before a new writer counts.
pub(crate) enum Full {
    /// Drop these write tags of the frame.
    Frame(SmallVec<[Writer; PER_FRAME]>),
    /// Clear all columns of all roots.
    All,
}

pub(crate) struct Writers {
    /// Per frame: index of its first node plus 1.
    heads: Vec<u32>,
    nodes: Vec<Node>,
    free: Vec<u32>,
}

impl Writers {
    pub(crate) fn new(frames: usize) -> Self {
        Self { heads: vec![0; frames], nodes: Vec::new(), free: Vec::new() }
    }

    /// Remembers that root `slot` may write the frame at `off` through linear `page`.
    pub(crate) fn record(&mut self, off: RamOffset, page: u64, slot: usize) -> Option<Full> {
        let head = *self.heads.get((off.raw() >> 12) as usize)?;
        let (mut at, mut length) = (head, 0);
        while at != 0 {
            let node = &mut self.nodes[at as usize - 1];
            if node.page == page {
                node.roots |= 1 << slot;
                return None;
            }
            at = node.next;
            length += 1;
        }
        let full = self.make_room(off, length);
        self.push(off, page, 1 << slot);
        full
    }

    fn make_room(&mut self, off: RamOffset, length: usize) -> Option<Full> {
        if length >= PER_FRAME {
            return Some(Full::Frame(self.take(off)));
        }
        if self.free.is_empty() && self.nodes.len() >= MAX_NODES {
            self.clear();
            return Some(Full::All);
        }
        None
    }

    fn push(&mut self, off: RamOffset, page: u64, roots: u64) {
        let head = &mut self.heads[(off.raw() >> 12) as usize];
        let node = Node { page, roots, next: *head };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() as u32 - 1
            }
        };
        *head = at + 1;
    }

    /// The frame's writers, forgotten here.
    pub(crate) fn take(&mut self, off: RamOffset) -> SmallVec<[Writer; PER_FRAME]> {
        let mut taken = SmallVec::new();
        let Some(head) = self.heads.get_mut((off.raw() >> 12) as usize) else { return taken };
        let mut at = std::mem::take(head);
        while at != 0 {
            let node = &self.nodes[at as usize - 1];
            taken.push((node.page, node.roots));
            self.free.push(at - 1);
            at = node.next;
        }
        taken
    }

    /// Whether root `slot` is known to write the frame through `page`.
    pub(crate) fn knows(&self, off: RamOffset, page: u64, slot: usize) -> bool {
        let mut at = self.heads.get((off.raw() >> 12) as usize).copied().unwrap_or(0);
        while at != 0 {
            let node = &self.nodes[at as usize - 1];
            if node.page == page {
                return node.roots >> slot & 1 != 0;
            }
            at = node.next;
        }
        false
    }

    pub(crate) fn clear(&mut self) {
        self.heads.fill(0);
        self.nodes.clear();
        self.free.clear();
    }
}
