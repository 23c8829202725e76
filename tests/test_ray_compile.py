"""Compiling on Ray: the bytes are those of places in one process, and workers that die change nothing of them."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from coreinfer.bundles.errors import CalibrationError, ConfigError
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.cli import main
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import read_documents
from coreinfer.compiler.text.reading import Shard

from .model_factory import build_tokenizer, corpus_texts
from .test_team import MANIFEST, compile_by, files_of
from .test_web_bundles import local_s3

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

__all__ = ["compile_by"]

_START_ATTEMPTS = 3
_KILLS = 3


@pytest.fixture(scope="module")
def shelf() -> Iterator[Any]:
    """A local S3, known to Ray's processes too."""
    with pytest.MonkeyPatch.context() as patch, local_s3(patch) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def ray_here(shelf: Any) -> Iterator[None]:
    """Ray, started once for this file; compiles that ask for it find it there."""
    for attempt in range(_START_ATTEMPTS):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            break
        except Exception:
            # It gives itself 30 seconds, which a busy machine may not have.
            ray.shutdown()
            if attempt == _START_ATTEMPTS - 1:
                raise
    yield
    ray.shutdown()


@pytest.fixture
def compile_on_ray(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> Callable[..., Path]:
    """A function (number of workers, **options) that compiles a tiny llama."""

    def run(num_workers: int, progress: Progress, **options: Any) -> Path:
        given = {"threads": 1, **options, "output": tmp_path / "on-ray", "ray": "local", "workers": num_workers}
        compile_model(replace(tiny_inputs("llama"), **given), progress)
        return tmp_path / "on-ray"

    return run


@pytest.fixture
def text_in_s3(shelf: Any, tmp_path: Path) -> str:
    """A folder of Parquet in row groups, of JSON Lines and of text."""
    import pyarrow.parquet

    texts = corpus_texts()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:60]}), tmp_path / "a.parquet", row_group_size=10)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[60:90]))
    (tmp_path / "c.txt").write_text("\n\n".join(text.replace("\n\n", " ") for text in texts[90:]))
    for name in ("a.parquet", "b.jsonl", "c.txt"):
        shelf.upload_file(str(tmp_path / name), "shelf", f"texts/{name}")
    return "s3://shelf/texts"


@pytest.mark.filterwarnings("ignore")
def test_texts_are_read_in_order_beside_workers_that_hold_all_cpus(shelf: Any) -> None:
    from coreinfer.compiler.team.ray_stream import ray_stream

    sources = [f"s3://shelf/many/{number}.txt" for number in range(50)]
    for number, source in enumerate(sources):
        # Of unlike sizes: later ones are read sooner.
        text = "\n\n".join(corpus_texts()[:: 1 + 20 * (number % 3)])
        shelf.put_object(Bucket="shelf", Key=source.removeprefix("s3://shelf/"), Body=text.encode())

    class Holder:
        def is_ready(self) -> bool:
            return True

    how = (build_tokenizer().backend_tokenizer, "text", 64)
    asked: list[Shard] = []

    def shards(names: Iterable[str]) -> Iterator[Shard]:
        for name in names:
            asked.append(Shard(source=name))
            yield asked[-1]

    holders = [ray.remote(num_cpus=1)(Holder).remote() for _ in range(2)]
    assert all(ray.get([holder.is_ready.remote() for holder in holders]))
    assert ray.available_resources().get("CPU", 0) == 0
    stream = ray_stream(read_documents, shards(sources), how, num_at_once=2)
    found = [next(stream) for _ in range(20)]
    stream.close()
    assert found == [read_documents(shard, *how) for shard in asked[:20]]
    assert [one.shard.source for one in found] == sources[:20]
    # Sixteen, and twice as many.
    assert len(asked) == 48
    stream = ray_stream(read_documents, shards([sources[0], "s3://shelf/none.txt", *sources]), how, num_at_once=2)
    assert next(stream) == found[0]
    with pytest.raises(CalibrationError, match=r"^--calibration s3://shelf/none\.txt: cannot be read \("):
        next(stream)
    for holder in holders:
        ray.kill(holder)


def test_one_worker_makes_the_bundle_that_a_process_alone_makes(
    compile_on_ray: Callable[..., Path], compile_by: Callable[..., Path]
) -> None:
    options = {"effort": "quick", "quantize": "int4", "dtype": "bfloat16"}
    alone, progress = compile_by(Alone, **options), Progress()
    on_ray = compile_on_ray(1, progress, **options)
    assert files_of(on_ray) == files_of(alone)
    assert (on_ray / MANIFEST).read_bytes() == (alone / MANIFEST).read_bytes()
    (worker,) = progress.workers
    assert {"embed", "profile", "reconstruct", "pack", "evaluate"} <= worker["stage_seconds"].keys()
    assert worker["peak_bytes"] > 1e8
    assert worker["sent_bytes"]["reconstruct"] > 0
    assert worker["num_replaced"] == 0


@pytest.mark.filterwarnings("ignore")
def test_workers_that_are_killed_are_replaced_and_the_bundle_is_the_same(
    compile_on_ray: Callable[..., Path],
    compile_by: Callable[..., Path],
    text_in_s3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from coreinfer.compiler.team import on_ray

    teams: list[on_ray.RayTeam] = []
    done, chances = threading.Event(), random.Random(1)

    class Watched(on_ray.RayTeam):
        def begin(self, loaded: LoadedModel) -> None:
            super().begin(loaded)
            teams.append(self)

    def kill() -> None:
        for _ in range(_KILLS):
            while not teams and not done.is_set():
                time.sleep(0.05)
            if done.wait(chances.uniform(0.05, 0.6)):
                return
            with suppress(ValueError):
                ray.kill(teams[0].actors[chances.randrange(2)], no_restart=False)

    monkeypatch.setattr(on_ray, "RayTeam", Watched)
    text = (text_in_s3,)
    expected, progress = compile_by(partial(Alone, size=2), name="expected", calibration=text), Progress()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = compile_on_ray(2, progress, calibration=text)
    finally:
        done.set()
        killer.join()
    assert files_of(found) == files_of(expected)
    options = json.loads((found / MANIFEST).read_text(encoding="utf-8"))["provenance"]["config"]
    assert options["workers"] == 2
    assert "ray" not in options
    assert sum(worker["num_replaced"] for worker in progress.workers) >= 1


def test_a_worker_that_rounds_otherwise_is_refused(
    compile_on_ray: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("coreinfer.compiler.team.place.arithmetic", lambda: {"Python": "2.7"})
    message = r"^--ray: worker on .*: Python: expected 2\.7, as where the compile was started, got 3\."
    with pytest.raises(ConfigError, match=message):
        compile_on_ray(1, Progress())
    assert not (tmp_path / "on-ray").exists()


def test_more_workers_than_there_are_cpus_are_refused(compile_on_ray: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^--ray local: expected 6 CPUs, for 3 workers of 2 threads, got 2;"):
        compile_on_ray(3, Progress(), threads=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--workers", "2"], "--workers 2: expected --ray ADDRESS with it"),
        (["--ray", "local"], "--ray local: expected --workers N with it"),
        (["--ray", "auto", "--workers", "2"], "--ray auto: expected --threads N with it"),
        (["--ray", "local", "--workers", "2", "--device", "cuda"], "--ray local: expected --device cpu, got cuda"),
        (["--ray", "local", "--workers", "0"], "--workers: expected"),
        (["--ray", "", "--workers", "1"], "--ray: expected an address, or local"),
    ],
)
def test_options_that_do_not_fit_are_one_line(given: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--model", "none", "-o", str(tmp_path / "b"), *given])
    assert result.exit_code != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
