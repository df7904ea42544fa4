"""What a job tells while it runs."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Images sampled, images per second and time left: a bar on stderr, or JSON lines on `log`."""

    def __init__(self, total: int, done: int, show: bool, log: TextIO | None):
        self.log, self.total, self.done, self.before = log, total, done, done
        self.start = self.last = time.monotonic()
        self.bar = None
        if show and not log:
            self.bar = tqdm(total=total, initial=done, unit="img", smoothing=0.05, dynamic_ncols=True, file=sys.stderr)

    def event(self, name: str, **values: Any) -> None:
        """Write one JSON line, if this job logs for machines."""
        if self.log:
            self.log.write(json.dumps({"event": name, **values}) + "\n")
            self.log.flush()

    def add(self, images: int) -> None:
        """Count `images` more."""
        self.done += images
        if self.bar is not None:
            self.bar.update(images)
        now = time.monotonic()
        if self.log and (now - self.last >= 1 or self.done == self.total):
            self.last = now
            rate = (self.done - self.before) / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate if rate else None
            self.event("progress", done=self.done, total=self.total, images_per_second=rate, seconds_left=left)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
