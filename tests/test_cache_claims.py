"""Claims: several jobs share a cache's shards, and a dead one's are free again."""

import errno
import os
import signal
import threading
import time

import pytest
from test_cache import FORK, contents, make_manifest, make_samples, write, write_shard

from nemo_kd.cache import CacheWriter, TopKCache, lease


def work(path, manifest, samples, written, seconds_a_shard=0.0):
    cache = CacheWriter.open(path, manifest)
    for index in cache.claim_shards():
        numbers = manifest.shard_samples(index)
        time.sleep(seconds_a_shard)
        write_shard(cache, index, samples[numbers.start : numbers.stop])
        written.put(index)


def test_jobs_share_the_shards_and_none_is_written_twice(tmp_path):
    manifest = make_manifest(num_samples=40)
    samples = make_samples(manifest)
    write(tmp_path / "alone", manifest, samples)
    written = FORK.Queue()
    processes = [
        FORK.Process(target=work, args=(tmp_path / "shared", manifest, samples, written, 0.01))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert sorted(written.get(timeout=60) for _ in range(20)) == list(range(20))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert written.empty()
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def hold(path, manifest, claimed):
    claims = CacheWriter.open(path, manifest).claim_shards()
    claimed.put(next(claims))
    time.sleep(60)


@pytest.fixture
def other_job(tmp_path):
    """A process that holds shard 0 of a cache of three."""
    manifest, claimed = make_manifest(), FORK.Queue()
    process = FORK.Process(target=hold, args=(tmp_path, manifest, claimed))
    process.start()
    assert claimed.get(timeout=60) == 0
    yield process
    process.kill()
    process.join()


def test_a_claim_is_free_once_its_process_is_dead(tmp_path, other_job):
    cache = CacheWriter.open(tmp_path, make_manifest())
    assert list(cache.claim_shards()) == [1, 2]
    os.kill(other_job.pid, signal.SIGKILL)
    other_job.join()
    assert list(cache.claim_shards()) == [0, 1, 2]
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_waiting_takes_over_what_another_gives_up(tmp_path, other_job):
    manifest = make_manifest()
    samples = make_samples(manifest)
    threading.Timer(0.2, other_job.kill).start()
    threading.Timer(0.3, other_job.join).start()  # until then it is a zombie, and has its id
    cache, order = CacheWriter.open(tmp_path, manifest), []
    for index in cache.claim_shards(wait=lambda: time.sleep(0.02)):
        numbers = manifest.shard_samples(index)
        write_shard(cache, index, samples[numbers.start : numbers.stop])
        order.append(index)
    assert order == [1, 2, 0]
    assert len(TopKCache.open(tmp_path)) == 5


def test_a_claim_from_elsewhere_is_free_once_it_is_stale(tmp_path):
    cache = CacheWriter.open(tmp_path, make_manifest())
    claim = tmp_path / ".tmp-claim-00001"
    claim.write_text("another-host-1 1\n")
    assert list(cache.claim_shards()) == [0, 2]
    CacheWriter.open(tmp_path, make_manifest())
    assert claim.exists()
    os.utime(claim, (time.time() - lease.STALE_S - 60,) * 2)
    assert list(cache.claim_shards([1])) == [1]
    assert not claim.exists()


def test_a_claim_whose_process_died_before_it_wrote_its_name_is_soon_free(tmp_path):
    cache = CacheWriter.open(tmp_path, make_manifest())
    claim = tmp_path / ".tmp-claim-00001"
    claim.touch()
    assert list(cache.claim_shards()) == [0, 2], "its process may be about to write"
    os.utime(claim, (time.time() - lease.UNNAMED_S - 1,) * 2)
    assert list(cache.claim_shards([1])) == [1]


def test_a_claim_that_is_held_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    claim = tmp_path / "claim"
    with lease.Lease(claim) as held:
        assert held
        os.utime(claim, (0, 0))
        deadline = time.monotonic() + 10
        while claim.stat().st_mtime < time.time() - 60:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with lease.Lease(claim) as again:
            assert not again
        assert claim.exists()
    assert not claim.exists()


def test_an_abandoned_loop_gives_its_claim_back(tmp_path):
    cache = CacheWriter.open(tmp_path, make_manifest())
    claims = cache.claim_shards()
    assert next(claims) == 0
    assert (tmp_path / ".tmp-claim-00000").exists()
    claims.close()
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_opening_removes_the_claims_on_finished_shards(tmp_path):
    manifest = make_manifest()
    samples = make_samples(manifest)
    cache = CacheWriter.open(tmp_path, manifest)
    write_shard(cache, 0, samples[:2])
    for index in (0, 1):  # its job was killed after it published shard 0
        (tmp_path / f".tmp-claim-0000{index}").write_text("another-host-1 1\n")
    CacheWriter.open(tmp_path, manifest)
    assert sorted(os.listdir(tmp_path)) == [".tmp-claim-00001", "manifest.json", "shard-00000"]


def test_a_full_disk_leaves_no_claim(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, mode):
            open(path, mode).close()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = CacheWriter.open(tmp_path, make_manifest())
    monkeypatch.setattr(lease, "open", Full, raising=False)
    with pytest.raises(OSError, match=r"No space left.*the cache is as it was"):
        next(cache.claim_shards())
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_full_disk_is_named(tmp_path):
    manifest = make_manifest()
    cache = CacheWriter.open(tmp_path, manifest)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = r"No space left.*shard 1 of .* was not written, the cache is as it was.*run again"
    with pytest.raises(OSError, match=message):
        write_shard(cache, 1, make_samples(manifest)[2:4], error)
    assert os.listdir(tmp_path) == ["manifest.json"]
