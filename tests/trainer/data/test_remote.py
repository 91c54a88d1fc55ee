"""Shards from a real HTTP server on loopback: healthy, slow, failing now and then, dying, lying."""

import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_tools.sample_format import Quarantined, load_manifest, save_quarantine
from tests.trainer.tiny import losses, sam_arguments, samples
from trainer import train
from trainer.config import Remote, is_remote
from trainer.data import remote
from trainer.data.order import DataOrder
from trainer.data.remote import AheadOrder, ShardError, make_room, open_cache
from trainer.data.shards import ShardReader, open_shards


class Server(ThreadingHTTPServer):
    """Serves a directory; the attributes spoil what it does with shards."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.seconds_per_shard = 0.0
        self.fail_every = 0  # every n-th request of any file gets a 500
        self.bytes_of_shards: int | None = None  # send so many, then close
        self.hang_after_bytes: int | None = None  # send so many, then say nothing more
        self.flip_a_bit = False
        self.released = threading.Event()  # lets hanging requests go

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        with server.lock:
            server.requests[name] += 1
            fails = server.fail_every and server.requests.total() % server.fail_every == 0
        if fails:
            self.send_error(500)
        elif name.endswith(".tar") and (path := Path(self.translate_path(self.path))).exists():
            self.send_shard(path.read_bytes())
        else:
            super().do_GET()

    def send_shard(self, data: bytes) -> None:
        server = self.server
        if server.flip_a_bit:
            data = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if server.hang_after_bytes is not None:
            self.wfile.write(data[: server.hang_after_bytes])
            server.released.wait(30)
            return
        data = data[: server.bytes_of_shards]
        for start in range(0, len(data), len(data) // 4 + 1):
            time.sleep(server.seconds_per_shard / 4)
            self.wfile.write(data[start : start + len(data) // 4 + 1])


@pytest.fixture
def server(scenes, tmp_path) -> Iterator[Server]:
    """Serves a copy of the `train` scenes (3 shards)."""
    shutil.copytree(scenes["train"], tmp_path / "served")
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Remote:
    """Patience of a test."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    return Remote(cache_dir=tmp_path / "cache", timeout_seconds=2.0, retries=2)


def read_all(reader: ShardReader) -> list[bytes]:
    rows = np.flatnonzero(np.asarray(reader.columns["jpg_size"]))
    return [reader.read(int(row)).jpeg for row in rows]


def tars(settings: Remote) -> list[str]:
    return sorted(path.name for path in settings.cache_dir.glob("*/*.tar"))


def leftovers(settings: Remote) -> list[Path]:
    return list(settings.cache_dir.rglob("*.part"))


def test_the_same_bytes_as_the_directory_each_shard_fetched_once(server, scenes, settings):
    reader = open_shards(server.url + "/", settings)
    assert not tars(settings), "shards come when they are read"
    local = ShardReader(scenes["train"])
    assert read_all(reader) == read_all(local)
    assert reader.fingerprint() == local.fingerprint()
    again = open_shards(server.url, settings)
    assert read_all(again) == read_all(local)
    travelled = pickle.loads(pickle.dumps(again))
    assert read_all(travelled) == read_all(local)
    assert len(pickle.dumps(again)) < 2000
    for name, count in server.requests.items():
        assert count == (2 if name in ("manifest.json", "quarantine.json") else 1), name
    assert len(tars(settings)) == 3
    assert not leftovers(settings)


def test_a_slow_server_is_not_a_dead_one(server, settings):
    server.seconds_per_shard = 1.2
    patience = settings.model_copy(update={"timeout_seconds": 0.8, "retries": 0})
    cache = open_cache(server.url, patience)
    cache.fetch(load_manifest(cache.directory).shards[0])
    assert len(tars(settings)) == 1


def test_failures_now_and_then_are_tried_again(server, scenes, settings):
    server.fail_every = 3
    assert read_all(open_shards(server.url, settings)) == read_all(ShardReader(scenes["train"]))
    assert max(server.requests.values()) >= 2
    assert not leftovers(settings)


def test_a_server_that_falls_silent_ends_in_an_error_within_the_stated_time(server, settings):
    patience = settings.model_copy(update={"timeout_seconds": 0.5, "retries": 1})
    reader = open_shards(server.url, patience)
    server.hang_after_bytes = 2000
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"no byte came for 0.5 s, after 2000") as caught:
        reader.read(0)
    assert 1.0 < time.monotonic() - started < 5.0  # two tries of 0.5 s, on a busy machine
    for part in (server.url, "shard-000000.tar", "after 2 tries in ", "data.remote.retries=1"):
        assert part in str(caught.value)
    assert not tars(settings)
    assert not leftovers(settings)


def test_a_server_that_is_gone_ends_in_an_error(server, settings):
    reader = open_shards(server.url, settings)
    server.shutdown()
    server.server_close()
    with pytest.raises(ShardError, match="gave up after 3 tries"):
        reader.read(0)
    with pytest.raises(ShardError, match=r"manifest.json could not be fetched"):
        open_shards(server.url, settings)


def test_a_body_cut_short_or_changed_is_never_trained_on(server, settings):
    reader = open_shards(server.url, settings)
    server.bytes_of_shards = 3000
    with pytest.raises(ShardError, match="gave up after 3 tries"):
        reader.read(0)
    server.bytes_of_shards, server.flip_a_bit = None, True
    with pytest.raises(ShardError, match="its SHA-256 is not the manifest's"):
        reader.read(0)
    assert not tars(settings)
    server.flip_a_bit = False
    reader.read(0)


def test_only_urls_that_can_be_read_pass_the_config(scenes, tmp_path, capsys):
    assert all(map(is_remote, ("https://a/b", "gs://a/b")))
    assert is_remote("pipe:ssh store cat /data/{}")
    assert not any(map(is_remote, ("data/sa1b", "/data/http", "ftp://a/b", "pipe:cat {0..9}.tar")))
    for source, said in (
        ("pipe:cat {0..9}.tar", "lacks {}, which stands for the name of a file"),
        ("ftp://a/b", "is no directory and no URL of http, https, s3, gs"),
    ):
        assert train.main(sam_arguments({**scenes, "train": source}, tmp_path / "run")) == 2
        assert f"data.shards: {source} {said}" in capsys.readouterr().err


def test_what_is_not_there_is_said_at_once(server, settings, tmp_path):
    with pytest.raises(ValueError, match=r"/nowhere holds no manifest.json"):
        open_shards(server.url + "/nowhere", settings)
    reader = open_shards(server.url, settings)
    (tmp_path / "served" / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000000.tar is missing"):
        reader.read(0)
    assert server.requests["shard-000000.tar"] == 1
    with pytest.raises(ValueError, match="s3fs"):
        open_shards("s3://bucket/shards", settings)


def test_a_data_set_packed_anew_is_another_one(server, settings, tmp_path):
    first = open_shards(server.url, settings)
    manifest = tmp_path / "served" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    second = open_shards(server.url, settings)
    assert first.directory != second.directory
    assert first.fingerprint() != second.fingerprint()


def test_the_least_recently_read_shard_makes_room(server, scenes, settings):
    shards = load_manifest(scenes["train"]).shards
    largest = sorted(shard.num_bytes for shard in shards)[-2:]
    small = settings.model_copy(update={"cache_gb": sum(largest) / 1e9})  # any two of the three
    reader = open_shards(server.url, small)
    starts = [0, *reader.ends[:-1]]
    reader.read(int(starts[0]))
    time.sleep(0.02)
    reader.read(int(starts[1]))
    time.sleep(0.02)
    reader.read(int(starts[0]) + 1)  # the older file, but in use
    held = dict(reader._files)
    reader.read(int(starts[2]))
    assert tars(settings) == ["shard-000000.tar", "shard-000002.tar"]
    reader.read(int(starts[1]) + 1)  # still open here: read on
    assert server.requests["shard-000001.tar"] == 1
    reader._close_evicted()
    assert set(reader._files) == set(held) - {1} | {2}
    reader.read(int(starts[1]) + 2)
    assert server.requests["shard-000001.tar"] == 2
    assert len(tars(settings)) == 2
    with pytest.raises(ShardError, match="is less than one shard"):
        make_room(shards[0].num_bytes, settings.model_copy(update={"cache_gb": 1e-6}))


def test_what_killed_processes_left_behind_goes_first(server, settings):
    reader = open_shards(server.url, settings)
    part = reader.directory / "shard-000009.tar.part"
    part.write_bytes(bytes(1000))
    tight = settings.model_copy(update={"cache_gb": 1500 / 1e9})
    make_room(1000, tight)
    assert part.exists(), "may be under way"
    long_ago = time.time() - 3 * settings.timeout_seconds
    os.utime(part, (long_ago, long_ago))
    make_room(1000, tight)
    assert not part.exists()


def fetch_first(url: str, settings: Remote, barrier) -> None:
    cache = open_cache(url, settings)
    info = load_manifest(cache.directory).shards[0]
    barrier.wait(30)
    assert cache.fetch(info).stat().st_size == info.num_bytes


def test_two_processes_fetch_a_shard_once(server, settings):
    server.seconds_per_shard = 0.5
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(2)
    processes = [context.Process(target=fetch_first, args=(server.url, settings, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.requests["shard-000000.tar"] == 1
    assert server.requests["image_id.npy"] == 1


def ahead(reader: ShardReader, num_lanes: int, window: int) -> AheadOrder:
    rows, _ = reader.split(0)
    return AheadOrder(rows, 3, num_lanes, window, reader.cache, reader.manifest.shards)


def test_fetching_ahead_knows_what_the_next_window_reads(server, settings):
    reader = open_shards(server.url, settings)
    order = ahead(reader, 2, 3)
    rows, _ = reader.split(0)
    plain = DataOrder(rows, 3, 2, 3)
    used: dict[tuple[int, int, int], set[int]] = {}
    for position in range(2 * plain.num_samples):
        epoch, place = divmod(position, plain.num_samples)
        window = used.setdefault((epoch, place % 2, place // 2 // 3), set())
        window.add(reader.shard_of(plain.row(position)))
        assert order.row(position) == plain.row(position)
    for (epoch, lane, window), shards in used.items():
        assert set(order.shards_of(epoch, lane, window)) == shards
    last = max(window for epoch, lane, window in used if (epoch, lane) == (0, 1))
    assert set(order.shards_of(0, 1, last + 1)) == used[1, 1, 0]


def test_shards_are_there_before_they_are_read(server, settings):
    reader = open_shards(server.url, settings)
    order = pickle.loads(pickle.dumps(ahead(reader, 1, 10)))
    order.row(0)
    wanted = {*order.shards_of(0, 0, 0), *order.shards_of(0, 0, 1)}
    deadline = time.monotonic() + 20
    while len(tars(settings)) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tars(settings) == sorted(reader.manifest.shards[shard].name for shard in wanted)


def test_training_from_a_server_is_training_from_the_directory(server, scenes, tmp_path):
    """In loader workers, which get the reader by pickle."""
    local, distant = tmp_path / "local", tmp_path / "distant"
    served = [f"data.remote.cache_dir={tmp_path / 'cache'}", "data.workers=1"]
    assert train.main(sam_arguments(scenes, local)) == 0
    assert train.main(sam_arguments({**scenes, "train": server.url}, distant, *served)) == 0
    assert samples(distant) == samples(local)
    assert losses(distant) == losses(local)
    assert max(count for name, count in server.requests.items() if name.endswith(".tar")) == 1


def test_training_stops_when_the_server_dies(server, scenes, tmp_path, capsys):
    quick = [f"data.remote={{cache_dir: {tmp_path / 'cache'}, timeout_seconds: 1, retries: 1}}", "data.workers=1"]
    server.hang_after_bytes = 100
    started = time.monotonic()
    assert train.main(sam_arguments({**scenes, "train": server.url}, tmp_path / "run", *quick)) == 2
    assert time.monotonic() - started < 60
    assert "gave up after 2 tries" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- commands


def test_a_command_is_a_source_like_any_other(scenes, settings, tmp_path, capsys):
    """Each file by a command of its own, its name in the place of {}; names are one word for the shell."""
    log = tmp_path / "asked"
    source = f"pipe:echo {{}} >> {log}; cat {scenes['train']}/{{}}"
    reader = open_shards(source, settings)
    assert "without quarantine list" in capsys.readouterr().err
    assert read_all(reader) == read_all(ShardReader(scenes["train"]))
    assert reader.fingerprint() == ShardReader(scenes["train"]).fingerprint()
    asked = Counter(log.read_text().split())
    assert asked.pop("quarantine.json") == 2, "a failure is tried once more"
    assert set(asked.values()) == {1}
    assert {"manifest.json", "index/width.npy", "shard-000002.tar"} <= set(asked)
    assert remote.url_of("pipe:cat {}", "a; touch b") == "pipe:cat 'a; touch b'"


def test_the_quarantine_list_comes_through_a_command(scenes, settings, tmp_path):
    copy = shutil.copytree(scenes["train"], tmp_path / "copy")
    save_quarantine(copy, [Quarantined(3, "key", "why")])
    assert open_shards(f"pipe:cat {copy}/{{}}", settings).quarantined == {3: "why"}


def test_a_command_that_fails_now_and_then_is_tried_again(scenes, settings, tmp_path):
    """Every other call fails half way, with a status that says so."""
    flag = tmp_path / "flag"
    source = (
        f"pipe:if rm {flag} 2>/dev/null; then cat {scenes['train']}/{{}}; "
        f"else touch {flag}; head -c 500 {scenes['train']}/{{}}; exit 3; fi"
    )
    assert read_all(open_shards(source, settings)) == read_all(ShardReader(scenes["train"]))


@pytest.mark.parametrize(
    ("shard_command", "said"),
    [
        ("sleep 301 | cat", "no byte came for 0.5 s, after 0"),
        ("head -c 700 {}; exec sleep 301", "no byte came for 0.5 s, after 700"),
        ("cat {}; exec 1>&-; sleep 301", "did not end within 0.5 s"),
        ("false", "exit 1"),
        ("head -c 700 {}", "it has 700 bytes, the manifest says"),
        ("tr a b < {}", "its SHA-256 is not the manifest's"),
    ],
    ids=["silent", "falls silent", "stays", "fails", "short", "changed"],
)
def test_a_command_that_cannot_deliver_ends_in_an_error(scenes, settings, shard_command, said):
    patience = settings.model_copy(update={"timeout_seconds": 0.5, "retries": 1})
    file = f"{scenes['train']}/{{}}"
    source = f"pipe:case {{}} in *.tar) {shard_command.replace('{}', file)};; *) cat {file};; esac"
    reader = open_shards(source, patience)
    started = time.monotonic()
    with pytest.raises(ShardError, match=said) as caught:
        reader.read(0)
    assert time.monotonic() - started < 10  # two tries of half a second at most, on a busy machine
    assert "after 2 tries" in str(caught.value)
    assert not tars(settings)
    assert not leftovers(settings)
    # `sleep 301` is nobody else's: nothing that the command started is left, once the kernel has got round to it.
    deadline = time.monotonic() + 10
    while sleepers := [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_sleeper(path)]:
        assert time.monotonic() < deadline, sleepers
        time.sleep(0.05)


def is_sleeper(path: Path) -> bool:
    try:
        return path.read_bytes() == b"sleep\x00301\x00"
    except OSError:  # the process has ended
        return False


def test_training_through_a_command_is_training_from_the_directory(scenes, tmp_path):
    local, piped = tmp_path / "local", tmp_path / "piped"
    assert train.main(sam_arguments(scenes, local)) == 0
    source = {**scenes, "train": f"pipe:cat {scenes['train']}/{{}}"}
    assert train.main(sam_arguments(source, piped, f"data.remote.cache_dir={tmp_path / 'cache'}")) == 0
    assert samples(piped) == samples(local)
    assert losses(piped) == losses(local)
