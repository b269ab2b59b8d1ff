//! Where labels go: beside their points, and never over each other, a marker or the edge.

/// A rectangle; `y` grows downwards, as in SVG.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Area {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

impl Area {
    /// The square around a point.
    pub fn around((x, y): (f64, f64), radius: f64) -> Self {
        Self { x: x - radius, y: y - radius, width: 2.0 * radius, height: 2.0 * radius }
    }

    /// The rectangle grown by `margin` on every side.
    pub fn grown(self, margin: f64) -> Self {
        let Self { x, y, width, height } = self;
        Self { x: x - margin, y: y - margin, width: width + 2.0 * margin, height: height + 2.0 * margin }
    }

    pub fn right(self) -> f64 {
        self.x + self.width
    }

    pub fn bottom(self) -> f64 {
        self.y + self.height
    }

    pub fn center(self) -> (f64, f64) {
        (self.x + self.width / 2.0, self.y + self.height / 2.0)
    }

    /// How far a point is from the rectangle.
    pub fn distance(self, (x, y): (f64, f64)) -> f64 {
        let beyond = |value: f64, low: f64, high: f64| (low - value).max(value - high).max(0.0);
        beyond(x, self.x, self.right()).hypot(beyond(y, self.y, self.bottom()))
    }

    /// Whether the two share more than an edge.
    pub fn meets(self, other: Self) -> bool {
        self.x < other.right() && other.x < self.right() && self.y < other.bottom() && other.y < self.bottom()
    }

    /// Whether `other` lies in this one.
    pub fn holds(self, other: Self) -> bool {
        self.x <= other.x && self.y <= other.y && other.right() <= self.right() && other.bottom() <= self.bottom()
    }

    /// Whether a line segment passes through (Liang and Barsky's clipping).
    pub fn is_crossed(self, (from, to): Segment) -> bool {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let (mut start, mut end) = (0.0f64, 1.0f64);
        for (step, room) in
            [(-dx, from.0 - self.x), (dx, self.right() - from.0), (-dy, from.1 - self.y), (dy, self.bottom() - from.1)]
        {
            if step == 0.0 {
                if room <= 0.0 {
                    return false;
                }
            } else if step < 0.0 {
                start = start.max(room / step);
            } else {
                end = end.min(room / step);
            }
        }
        start < end
    }
}

/// A straight line between two points.
pub type Segment = ((f64, f64), (f64, f64));

/// A label that wants to be near a point.
#[derive(Clone, Copy, Debug)]
pub struct Label {
    pub point: (f64, f64),
    pub width: f64,
    pub height: f64,
    /// How far from the point the label begins.
    pub clearance: f64,
}

/// Compass directions in the order in which they are preferred: above, below, the sides, the corners.
const DIRECTIONS: [(f64, f64); 8] =
    [(0.0, -1.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.0), (1.0, -1.0), (-1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)];

/// Space between labels, and between a label and what it must not cover.
const GAP: f64 = 1.0;

/// By how much another's point may be nearer to a label than its own where no better place is free: such points almost
/// coincide.
const SLACK: f64 = 2.0;

/// Places labels within `bounds`, each off all `obstacles`, `lines` and labels before it, as near to its point as may be, and
/// no nearer to the point of any other label. One that finds no place gets none.
pub fn place(labels: &[Label], obstacles: &[Area], lines: &[Segment], bounds: Area) -> Vec<Option<Area>> {
    let mut taken = obstacles.to_vec();
    let mut placed = Vec::with_capacity(labels.len());
    for label in labels {
        let free = |area: &Area| {
            bounds.holds(*area)
                && !taken.iter().any(|other| area.grown(GAP).meets(*other))
                && !lines.iter().any(|&line| area.grown(GAP).is_crossed(line))
        };
        // Nearer to another's point it would be read as the other's value.
        let own = |area: &Area, slack: f64| {
            let away = area.distance(label.point);
            labels.iter().all(|other| other.point == label.point || away < area.distance(other.point) + slack)
        };
        let find = |slack| candidates(label).find(|area| free(area) && own(area, slack));
        let found = find(0.0).or_else(|| find(SLACK));
        taken.extend(found);
        placed.push(found);
    }
    placed
}

/// Places around the label's point, in rings.
fn candidates(label: &Label) -> impl Iterator<Item = Area> + '_ {
    (0..6).flat_map(move |ring| {
        let away = label.clearance + f64::from(ring) * label.height * 0.5;
        DIRECTIONS.into_iter().map(move |(dx, dy)| {
            let ((x, y), Label { width, height, .. }) = (label.point, *label);
            let center = (x + dx * (away + width / 2.0), y + dy * (away + height / 2.0));
            Area { x: center.0 - width / 2.0, y: center.1 - height / 2.0, width, height }
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const BOUNDS: Area = Area { x: 10.0, y: 5.0, width: 380.0, height: 250.0 };

    fn scene() -> impl Strategy<Value = (Vec<Label>, Vec<Area>, Vec<Segment>)> {
        let point = || (0.0..400.0, 0.0..260.0);
        let label = (point(), 4.0..90.0, 4.0..14.0, 0.0..9.0).prop_map(|(point, width, height, clearance)| Label {
            point,
            width,
            height,
            clearance,
        });
        let obstacle = (point(), 1.0..12.0).prop_map(|(point, radius)| Area::around(point, radius));
        (vec(label, 0..40), vec(obstacle, 0..40), vec((point(), point()), 0..10))
    }

    proptest! {
        #[test]
        fn labels_meet_nothing_and_stay_inside((labels, obstacles, lines) in scene()) {
            let placed = place(&labels, &obstacles, &lines, BOUNDS);
            prop_assert_eq!(placed.len(), labels.len());
            let found: Vec<Area> = placed.iter().flatten().copied().collect();
            for (index, area) in found.iter().enumerate() {
                prop_assert!(BOUNDS.holds(*area), "{:?} leaves the bounds", area);
                prop_assert!(!obstacles.iter().any(|other| area.meets(*other)), "{:?} covers a marker", area);
                prop_assert!(!lines.iter().any(|line| area.is_crossed(*line)), "{:?} covers a line", area);
                prop_assert!(!found[..index].iter().any(|other| area.meets(*other)), "{:?} covers a label", area);
            }
            for (label, area) in labels.iter().zip(&placed) {
                let size = area.map(|area| (area.width, area.height));
                let nearer = |area: Area| labels.iter().all(|other| {
                    other.point == label.point || area.distance(label.point) < area.distance(other.point) + SLACK
                });
                prop_assert!(area.is_none_or(nearer), "{:?} is nearer to another point", area);
                prop_assert!(size.is_none_or(|size| size == (label.width, label.height)));
            }
        }

        #[test]
        fn a_lone_label_is_always_placed_beside_its_point(x in 60.0..340.0, y in 40.0..220.0, width in 4.0..90.0) {
            let label = Label { point: (x, y), width, height: 10.0, clearance: 5.0 };
            let area = place(&[label], &[Area::around((x, y), 4.0)], &[], BOUNDS)[0].unwrap();
            prop_assert!(area.grown(5.5).meets(Area::around((x, y), 0.1)));
        }

        #[test]
        fn segments_cross_what_they_pass_through(x in 0.0..100.0, y in 0.0..100.0, angle in 0.0..std::f64::consts::TAU) {
            let area = Area { x: 40.0, y: 40.0, width: 20.0, height: 10.0 };
            let line = ((x, y), (x + 60.0 * f64::cos(angle), y + 60.0 * f64::sin(angle)));
            let inside = |t: f64| {
                let at = (line.0.0 + t * (line.1.0 - line.0.0), line.0.1 + t * (line.1.1 - line.0.1));
                area.holds(Area { x: at.0, y: at.1, width: 0.0, height: 0.0 })
            };
            let sampled = (0..=4000).any(|step| inside(f64::from(step) / 4000.0));
            // Sampling misses a corner that is cut by less than a step.
            prop_assert!(!sampled || area.grown(1e-9).is_crossed(line));
            prop_assert!(sampled || !area.grown(-0.02).is_crossed(line));
        }
    }

    #[test]
    fn lines_are_left_free_and_full_bounds_take_nothing() {
        let label = Label { point: (200.0, 100.0), width: 40.0, height: 10.0, clearance: 4.0 };
        let line = ((200.0, 100.0), (200.0, 10.0));
        let area = place(&[label], &[], &[line], BOUNDS)[0].unwrap();
        assert!(!area.is_crossed(line) && area.y > 100.0, "{area:?}");
        assert_eq!(place(&[label], &[BOUNDS], &[], BOUNDS), [None]);
        let wide = Label { width: 500.0, ..label };
        assert_eq!(place(&[wide], &[], &[], BOUNDS), [None]);
    }
}
