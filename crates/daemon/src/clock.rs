//! Times as people and programs read them.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;

/// The present time, as [`utc`] writes it.
#[expect(clippy::disallowed_methods, reason = "what is shown is the wall clock; nothing is measured by it")]
pub fn now() -> String {
    utc(SystemTime::now())
}

/// A time in UTC, to the millisecond, as RFC 3339 writes it.
pub fn utc(time: SystemTime) -> String {
    format!("{:.3}", Timestamp::try_from(time).unwrap_or_default())
}

/// A length of time in its two largest units: `42s`, `5m10s`, `3d4h`.
pub fn short(time: Duration) -> String {
    let seconds = time.as_secs();
    let two = |large: u64, unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{large}{unit}"),
        small => format!("{large}{unit}{small}{small_unit}"),
    };
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => two(seconds / 60, "m", seconds % 60, "s"),
        3_600..86_400 => two(seconds / 3_600, "h", seconds / 60 % 60, "m"),
        _ => two(seconds / 86_400, "d", seconds / 3_600 % 24, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let at = |seconds| utc(SystemTime::UNIX_EPOCH + Duration::from_millis(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_709_251_199_123), "2024-02-29T23:59:59.123Z");
        assert_eq!(at(4_102_444_800_000), "2100-01-01T00:00:00.000Z");
    }

    #[test]
    fn lengths_of_time_have_two_units() {
        let lengths = [0, 59, 60, 61, 3_600, 3_661, 86_400, 273_600].map(|seconds| short(Duration::from_secs(seconds)));
        assert_eq!(lengths, ["0s", "59s", "1m", "1m1s", "1h", "1h1m", "1d", "3d4h"]);
    }
}
