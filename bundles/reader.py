"""Open a bundle, or report everything that is wrong with it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from .checksums import mapped_sha256, passing_sha256
from .contract import check_neuron_ids, check_tensors, cluster_tensors, dense_tensors, token_share_tensors
from .down_norms import Floats, down_norms
from .errors import BundleCorrupt, BundleError, ConfigError, join_problems
from .layout import LAYOUT
from .manifest import Manifest, TensorRecord, read_manifest
from .tensors import TensorFile
from .token_shares import check_token_shares

__all__ = ["Bundle", "find_problems", "later_files", "open_bundle"]

Hash = Callable[[Path], str]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An open bundle: checked, memory-mapped, nothing copied.

    Attributes:
        path: its folder.
        base: everything that is not FFN.
        dense: the dense FFN, None where the bundle was compiled without.
        mapped: cluster -> its pack, of those that are here; use `pack` to get one.
        token_shares: which inputs a decoded token leaves out, None where it reads all; see `token_thresholds`.
        unchecked: clusters whose packs were not hashed yet.
        fetch: puts a file into the folder if it is not there; None where all are.
        spares_memory: leave no pages behind when files are hashed.
    """

    path: Path
    manifest: Manifest
    base: TensorFile
    dense: TensorFile | None
    mapped: dict[int, TensorFile]
    unchecked: set[int] = field(default_factory=set)
    fetch: Callable[[str], None] | None = None
    spares_memory: bool = False
    token_shares: TensorFile | None = None

    @property
    def packs(self) -> tuple[TensorFile, ...]:
        """The packs of all clusters, each checked."""
        return tuple(
            self.pack(number) for number, cluster in enumerate(self.manifest.clusters) if cluster.file is not None
        )

    @cached_property
    def down_norms(self) -> Floats:
        """Norms of the columns of the dense FFN's down projections, (layers, ffn_dim) float32; see `down_norms`."""
        assert self.dense is not None
        return down_norms(self.dense, self.manifest)

    def weights_of(self, cluster: int | None) -> int | None:
        """The pack that a cluster decodes with; None of the dense FFN, which a thin cluster decodes with too."""
        return None if cluster is None or self.manifest.clusters[cluster].file is None else cluster

    def pack(self, cluster: int) -> TensorFile:
        """Return a cluster pack; a lazily opened one is checked first, and fetched before if it is not here.

        Raises:
            ConfigError: the cluster is thin.
            BundleCorrupt: it does not fit the manifest.
            BundleError: it cannot be fetched.
        """
        if cluster in self.unchecked:
            self.bring(cluster)
            name = self._pack_name(cluster)
            problem = _file_problem(self.path / name, name, self.manifest, self._hash)
            problems = [problem] if problem else check_neuron_ids(self.mapped[cluster], self.manifest)
            if problems:
                raise BundleCorrupt(f"bundle {self.path}: {join_problems(problems)}; {_advice(self.fetch)}")
            self.unchecked.discard(cluster)
        elif cluster not in self.mapped:
            self._pack_name(cluster)
        return self.mapped[cluster]

    def _pack_name(self, cluster: int) -> str:
        name = self.manifest.clusters[cluster].file
        if name is None:
            raise ConfigError(f"bundle {self.path}: cluster {cluster} is thin and has no pack; use the dense FFN")
        return name

    def bring(self, cluster: int) -> None:
        """Have a cluster's pack here: fetch it if it is not. A thin cluster has none to fetch.

        Raises:
            BundleError: it cannot be fetched, or is not what the manifest describes.
        """
        if cluster in self.mapped or self.fetch is None:
            return
        name = self.manifest.clusters[cluster].file
        if name is None:
            return
        self.fetch(name)
        file = TensorFile(self.path / name)
        problems = _tensor_problems(
            file, name, cluster_tensors(self.manifest, cluster, file), self.manifest, with_ids=False
        )
        if problems:
            raise BundleCorrupt(f"bundle {self.path}: {join_problems(problems)}; {_advice(self.fetch)}")
        self.mapped[cluster] = file

    def prefetch(self, cluster: int) -> None:
        """Have the system read a pack ahead, if it is here; returns at once."""
        if cluster in self.mapped:
            self.mapped[cluster].prefetch()

    @property
    def _hash(self) -> Hash:
        return _hash(spare_memory=self.spares_memory)

    def read_bytes(self, name: str) -> bytes:
        """Read one of the small files by its name in the layout."""
        return (self.path / name).read_bytes()

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest.files


def _advice(fetch: Callable[[str], None] | None) -> str:
    return "copy or compile it again" if fetch is None else "delete the damaged files there to have them fetched again"


def open_bundle(
    bundle_dir: str | Path,
    *,
    checksums: bool = True,
    lazy_packs: bool = False,
    fetch: Callable[[str], None] | None = None,
    spare_memory: bool = False,
) -> Bundle:
    """Open a bundle after checking every file of it.

    Args:
        bundle_dir: a folder that coreinfer-compile wrote.
        checksums: hash every file; without, only presence, sizes, shapes and dtypes are checked.
        lazy_packs: leave it to `Bundle.pack` to hash each cluster pack when it is first used: hashing gigabytes of
            packs of which one is used would take longer than the answer. Only with `checksums`.
        fetch: of a bundle that is elsewhere (`remote.opening`), which may lack packs; they come when `pack` is called.
        spare_memory: hash files so that none of their pages stays in memory; else those that are mapped do.
    Raises:
        BundleNotFound: there is no bundle.
        BundleVersionError: another schema version wrote it.
        BundleCorrupt: files are missing or damaged; the message names all of them.
    """
    path = Path(bundle_dir)
    manifest = read_manifest(path)
    lazy_packs = lazy_packs and checksums
    absent = {name for name in later_files(manifest) if fetch and not (path / name).exists()}
    hash_with = _hash(spare_memory=spare_memory) if checksums else None
    problems, files = _examine(path, manifest, hash_with, lazy_packs=lazy_packs, absent=absent)
    if problems:
        raise BundleCorrupt(f"bundle {path}: {join_problems(problems)}; {_advice(fetch)}")
    return Bundle(
        path=path,
        manifest=manifest,
        base=files[LAYOUT.base],
        dense=files[LAYOUT.dense] if manifest.has_dense else None,
        mapped={
            number: files[cluster.file]
            for number, cluster in enumerate(manifest.clusters)
            if cluster.file is not None and cluster.file in files
        },
        unchecked={number for number, cluster in enumerate(manifest.clusters) if cluster.file is not None}
        if lazy_packs
        else set(),
        fetch=fetch,
        spares_memory=spare_memory,
        token_shares=files[LAYOUT.token_shares] if manifest.token_shares is not None else None,
    )


def later_files(manifest: Manifest) -> set[str]:
    """Name the files that a bundle can be opened without: cluster packs, and the report, which only people read."""
    return {LAYOUT.report, *manifest.pack_files}


def find_problems(
    bundle_dir: Path, manifest: Manifest, *, checksums: bool = True, lazy_packs: bool = False
) -> list[str]:
    """List everything that is wrong with a bundle's files, one line each; an empty list means that they are all right.

    With `lazy_packs`, hashes and neuron ids of cluster packs are not checked.
    """
    hash_with = _hash(spare_memory=False) if checksums else None
    return _examine(bundle_dir, manifest, hash_with, lazy_packs=lazy_packs)[0]


def _hash(*, spare_memory: bool) -> Hash:
    return passing_sha256 if spare_memory else mapped_sha256


def _examine(
    bundle_dir: Path,
    manifest: Manifest,
    hash_with: Hash | None,
    *,
    lazy_packs: bool,
    absent: Collection[str] = (),
) -> tuple[list[str], dict[str, TensorFile]]:
    """List what is wrong, and map the tensor files by name: all but `absent` ones where nothing is."""
    if problems := _outside_paths(manifest) or _unlisted_parts(manifest):
        return problems, {}
    packs = set(manifest.pack_files)
    unread = packs if lazy_packs else set()
    present = [name for name in manifest.files if name not in absent]
    hashes = {name: None if name in unread else hash_with for name in present}
    damaged = _damaged_files(bundle_dir, manifest, hashes)
    problems = list(damaged.values())
    files: dict[str, TensorFile] = {}
    for name, expected in _tensor_files(manifest):
        if name in damaged or name in absent:
            continue
        try:
            files[name] = TensorFile(bundle_dir / name)
        except BundleError as error:
            problems.append(str(error))
        else:
            records = expected(files[name])
            problems += _tensor_problems(files[name], name, records, manifest, with_ids=name in packs - unread)
    return problems, files


def _outside_paths(manifest: Manifest) -> list[str]:
    names = [*manifest.files, *manifest.pack_files]
    return [
        f"manifest names {name!r}, which is no path inside the bundle"
        for name in dict.fromkeys(names)
        if not name
        or not name.isprintable()
        or ".." in PurePosixPath(name).parts
        or PurePosixPath(name).is_absolute()
        or PureWindowsPath(name).drive
        or "\\" in name
    ]


def _unlisted_parts(manifest: Manifest) -> list[str]:
    """Name the parts that every bundle must have and this manifest does not list."""
    required = [LAYOUT.base, LAYOUT.tokenizer, LAYOUT.generation, LAYOUT.router_index, LAYOUT.router_tokenizer]
    required += [LAYOUT.router_table, *manifest.pack_files]
    if manifest.plan.dense:
        required.append(LAYOUT.dense)
    if manifest.token_shares is not None:
        required.append(LAYOUT.token_shares)
    problems = [f"manifest lists no {name}" for name in required if name not in manifest.files]
    if not manifest.clusters:
        problems.append("manifest lists no clusters")
    budgets = {"plan": manifest.plan.layer_budgets}
    budgets |= {f"clusters[{number}]": cluster.layer_budgets for number, cluster in enumerate(manifest.clusters)}
    expected = manifest.model.num_layers
    return problems + [
        f"manifest.{place}.layer_budgets: expected {expected} layers, got {len(found)}"
        for place, found in budgets.items()
        if len(found) != expected
    ]


def _damaged_files(bundle_dir: Path, manifest: Manifest, hashes: Mapping[str, Hash | None]) -> dict[str, str]:
    """Map each file of `hashes` that is missing or not as listed to what is wrong with it."""

    def check(name: str) -> str | None:
        return _file_problem(bundle_dir / name, name, manifest, hashes[name])

    # Hashing releases the GIL, so that threads share the work.
    with ThreadPoolExecutor() as pool:
        found = zip(hashes, pool.map(check, hashes), strict=True)
        return {name: problem for name, problem in found if problem}


def _file_problem(path: Path, name: str, manifest: Manifest, hash_with: Hash | None) -> str | None:
    record = manifest.files[name]
    try:
        num_bytes = path.stat().st_size
        if not path.is_file():
            return f"{name}: is no file"
        if num_bytes != record.bytes:
            return f"{name}: expected {record.bytes} bytes, got {num_bytes}"
        if hash_with and (digest := hash_with(path)) != record.sha256:
            return f"{name}: expected sha256 {record.sha256[:12]}..., got {digest[:12]}..."
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    return None


def _tensor_files(manifest: Manifest) -> Sequence[tuple[str, Callable[[TensorFile], dict[str, TensorRecord]]]]:
    """Names of the tensor files, and what each must hold: packs may list the experts that they have."""
    files: list[tuple[str, Callable[[TensorFile], dict[str, TensorRecord]]]] = [
        (LAYOUT.base, lambda _: manifest.base_tensors)
    ]
    if manifest.has_dense:
        files.append((LAYOUT.dense, lambda _: dense_tensors(manifest)))
    if manifest.token_shares is not None:
        files.append((LAYOUT.token_shares, lambda _: token_share_tensors(manifest)))
    return files + [
        (cluster.file, partial(cluster_tensors, manifest, number))
        for number, cluster in enumerate(manifest.clusters)
        if cluster.file is not None
    ]


def _tensor_problems(
    file: TensorFile,
    name: str,
    expected: Mapping[str, TensorRecord],
    manifest: Manifest,
    *,
    with_ids: bool,
) -> list[str]:
    problems = check_tensors(file, expected)
    if with_ids and not problems:
        problems = check_neuron_ids(file, manifest)
    if name == LAYOUT.token_shares and not problems:
        problems = check_token_shares(file, manifest)
    return [problem.replace(str(file.path), name) for problem in problems]
