"""What a teacher run shows of itself: one bar, and a line when it waits for others."""

import sys
import time

from tqdm import tqdm

from nemo_kd.cache import CacheWriter


class Progress:
    """A bar that moves with the micro batches of this replica and the shards of all of them.

    Args:
        writer: Of the cache.
        missing: The shards to fill.
        shown: Whether this process is the one that shows the bar.
    """

    def __init__(self, writer: CacheWriter, missing: list[int], shown: bool) -> None:
        self._writer, self._missing, self._shown = writer, missing, shown
        self._published = self._in_hand = self._num_tokens = 0
        self._start_s = time.monotonic()
        self._has_waited = False
        self._bar = tqdm(
            desc=f"{writer.path.name}, {len(missing)} shards",
            total=self._num_samples(missing),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} samples [{elapsed}<{remaining}{postfix}]",
            disable=not (shown and missing),
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
            smoothing=0,  # the time left follows the mean rate: other replicas' shards come at once
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_samples: int, num_tokens: int) -> None:
        """Count a micro batch of this replica."""
        self._in_hand += num_samples
        self._num_tokens += num_tokens
        rate = self._num_tokens / (time.monotonic() - self._start_s)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s a replica", refresh=False)
        self._move()

    def look(self) -> None:
        """Count what all replicas, of this job and of others, have published."""
        self._published = self._num_samples(self._missing) - self._num_samples(self._left())
        self._in_hand = 0
        self._move()

    def wait(self) -> None:
        """The same, while all shards that are left are claimed by others; says so once."""
        self.look()
        if self._shown and not self._has_waited:
            self._has_waited = True
            tqdm.write(
                f"{self._writer.path}: waiting for {len(self._left())} shards that other processes "
                "fill; this one takes those that they give up",
                file=sys.stderr,
            )

    def _left(self) -> list[int]:
        return self._writer.missing_shards(self._missing)

    def _num_samples(self, shards: list[int]) -> int:
        return sum(len(self._writer.manifest.shard_samples(shard)) for shard in shards)

    def _move(self) -> None:
        self._bar.update(max(0, self._published + self._in_hand - self._bar.n))
