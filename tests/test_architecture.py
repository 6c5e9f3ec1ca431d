"""Tests of the source as a whole: no import cycles, packages in their order, no hidden state. All are read by AST."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"

# Imports --------------------------------------------------------------------------------------------------------------

MAY_IMPORT = {
    "common": "",
    "io": "common",
    "model": "common",
    "autoencoders": "common model",
    "sampling": "common model autoencoders",
    "fast": "common model autoencoders sampling",
    "text": "common io",
    "pipeline": "common io model autoencoders sampling fast text",
    "data": "common io model autoencoders sampling fast text pipeline",
    "training": "common io model autoencoders sampling fast text pipeline data",
    "evaluation": "common io model autoencoders sampling fast text pipeline",
    "serving": "common io model autoencoders sampling fast text pipeline data",
    "bench": "common io model autoencoders sampling fast text pipeline data training",
    "nova_worlds": "common io model autoencoders sampling fast text pipeline data training evaluation bench",
}
"""Packages -> those that they import, wherever in a module. `cli` may import all of them."""
CYCLES = {
    ("nova_video.pipeline.plan", "nova_video.pipeline.request"): "types alone",
}
"""Imports, each with the reason, without which there is no cycle."""


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in SRC.rglob("*.py"):
        name = ".".join(path.relative_to(SRC).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Modules -> the modules that they import: at the top, in functions and for types alone.

    The root is left out: it exports names of every package, each loaded on first use, and the version.
    """
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for name, tree in modules().items():
        if name == "nova_video":
            continue
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for target in names:
                while target and target not in graph:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    graph[name].add(target)
    return graph


def room(module: str) -> str:
    """The package of a module; the root's own modules are the root's."""
    first, _, rest = module.partition(".")
    return first if first == "nova_worlds" or not rest else rest.partition(".")[0]


def test_no_import_cycle() -> None:
    graph = {name: {to for to in found if (name, to) not in CYCLES} for name, found in imports().items()}
    while graph:
        inward = set().union(*graph.values())
        outside = {name for name, found in graph.items() if name not in inward or not found & graph.keys()}
        if not outside:
            break
        graph = {name: found - outside for name, found in graph.items() if name not in outside}
    assert not graph, "modules of a cycle, or between two"


def test_packages_import_only_what_comes_before_them() -> None:
    pairs = {(room(name), room(to)) for name, found in imports().items() for to in found}
    wrong = {
        (one, other)
        for one, other in pairs
        if one in MAY_IMPORT and other not in (one, "nova_video", *MAY_IMPORT[one].split())
    }
    assert not wrong


def test_a_package_tells_what_it_may_import() -> None:
    for name, packages in MAY_IMPORT.items():
        module = modules()[name if name == "nova_worlds" else f"nova_video.{name}"]
        told = " ".join((ast.get_docstring(module) or "").split()).partition("It may import ")[2].split(".")[0]
        assert "every package" in told or re.findall(r"`(\w+)`", told) == packages.split(), name


# State ----------------------------------------------------------------------------------------------------------------

CHANGING = {
    "are of one request, which runs or streams in one place at a time": """
        Generation SamplingState OpenFrame TemporalCache Modulations FastEngine Stopwatch FrameDecoder StreamDecoder
        Conditions Interrupts Sampler TileParts Window""",
    "are of the generations that join them": "Together",
    "are of one job or queue of a server, which one thread works off or a lock guards": """
        ActiveJob Feed Sweeper Worker""",
    "are of one file that is read or written": "LiveWriter Media Video _Deinterlacer _TensorCheck",
    "are of one run of training": """
        Average CudaRecorder DatasetTask Log Pool Reader ReplicatedModule Rows Run SharedClock StepGraphs Stepper
        StopSignal Stream Throughput""",
    "are of one run of nova encode": "DecodeLatents EncodeLatents EncodeText Marks OneByOne GroupRecord _Comparer",
    "are of one benchmark": "Maker",
    "are of one request or connection of a server": """
        Answer BodyReader Connection Pace Pacemaker PatientProtocol Seats WordedRequest""",
    "are of one server, and hold what it is at under a lock": "Readiness ServerMetrics",
    "hold captured graphs, made under a lock": "Buffer GraphRunner",
    "are switched as diffusers' own are, by their users": "VideoAutoencoder",
    "move a part's tensors to the device and back": "OffloadHook",
    "hold adapters, graphs and copies for their calls": "AdapterMixin Engines NamedTextEncoder NovaPipeline",
}
"""What objects are that change themselves after construction -> their classes."""
WRITES = {
    "a library's object that was made here is set up": [
        "FragmentEncoder._write: container",
        "FragmentEncoder._write: stream",
        "LiveWriter._later: packet",
        "LiveWriter._write: packet",
        "LiveWriter: self._container",
        "LiveWriter: self._stream",
        "Picture: self.image",
        "ReplicatedModule._send: how",
        "Video: self.stream",
        "add_stream: stream",
        "create_app: app",
        "_alpha: image",
        "_join: file",
        "_join: packet",
        "_later: packet",
        "_encode_window: pending",
        "_write_video: container",
        "upright_srgb: colour",
    ],
    "a copy of a module is given its other parts": ["over: setattr"],
    "a record that the caller owns is filled": [
        "InpaintEmpty.judge: verdict",
        "Maker._batch: generation",
        "Runs.sampled: generation",
        "_Comparer.compare: counts",
        "_Comparer: self.result",
        "_encode: comparison",
        "Worker._open: generation",
        "_make: generation",
        "gather: facts",
        "renew_records: record",
        "revise_groups: comparison",
        "solver_rows: scheduler",
        "whole_records: record",
        "with_entries: record",
    ],
    "a request is advanced or changed, under its lock": [
        "Together._company: each",
        "change_request: progress",
        "change_request: setattr",
        "Together.make_next: each",
        "fix_set: frame",
        "fix_set: state",
        "open_set: state",
    ],
    "weights are moved to the device and back, as the hook is for": [
        "OffloadHook.to_device: tensor",
        "OffloadHook.init_hook: tensor",
        "OffloadHook.to_host: tensor",
    ],
    "training owns its optimizer and modules, and torch reads its state there": [
        "Processes.accumulating: module",
        "Stepper: self.optimizer",
        "load_checkpoint: optimizer",
    ],
    "the command owns its process, and sets threads, signals and kernels for all of it": [
        "set_kernels: torch",
        "set_kernels: torch.set_float32_matmul_precision",
        "set_kernels: torch.backends.cuda.enable_cudnn_sdp",
        "compile_every_variant: torch",
        "measure_training: torch._dynamo.reset",
        "hide: _hidden_names.append",
        "hide: sys",
        "reveal: _hidden_names.pop",
        "reveal: sys.modules.pop",
        "load_extension: sys.path.insert",
        "sleep_while_waiting: os.environ.setdefault",
        "use_fitting_threads: torch.set_num_threads",
        "BatchMaker.pipe: torch.set_num_threads",
        "Replica.__init__: torch.set_num_threads",
        "_ray: ray",
        "ray_session: os",
        "ray_session: os.environ.pop",
        "ray_session: os.environ.update",
    ],
    "old names of modules are found by Python's own way in": [
        "MovedModules.exec_module: module",
        "find_moved_modules: sys.meta_path.append",
    ],
    "each new connection to a database is set up": ["_set_up_sqlite: connection"],
    "torch keeps the number of threads by thread": ["prefetch.work: torch.set_num_threads"],
    "a user asks for all compiled code to be dropped": ["Engines.release: torch.compiler.reset"],
    "torch has no public way to close the pool of a failed capture": [
        "abandon_recording: torch._C._cuda_endAllocateToPool",
        "abandon_recording: torch._C._cuda_releasePool",
    ],
    "diffusers finds pipelines only among its own names": [
        "<module>: NovaPipeline",
        "_AddingFinder.find_spec: spec",
        "_AddingFinder.find_spec: sys.meta_path.remove",
        "_add: module",
        "register: setattr",
        "register: sys.meta_path.insert",
    ],
    "the limit of Pillow is put back at once, under a lock": ["_open: Image"],
    "a decorator completes the class that it decorates": ["with_aliases: record", "with_aliases: setattr"],
    "a frozen request reads what it was given once": ["GenerateRequest._check_given: object.__setattr__"],
}
"""Why `function: what` or `Class: what`, which is another's, is changed."""

OWN = {name for names in CHANGING.values() for name in names.split()}
MUTATING = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
PROCESS = (
    "sys.path.",
    "sys.modules.",
    "sys.meta_path.",
    "os.environ.setdefault",
    "os.environ.update",
    "os.environ.pop",
    "torch._C.",
    "torch._dynamo.reset",
    "torch.compiler.reset",
    "torch.backends.cuda.enable",
    "torch.set_",
)
"""Calls that change the whole process, or reach into torch's private parts."""
CONSTRUCTION = ("__init__", "__post_init__", "__new__")


def targets(node: ast.AST) -> Iterator[ast.expr]:
    """Attributes and items that a statement assigns to or deletes."""
    found: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        found = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        found = [node.target]
    elif isinstance(node, ast.With):
        found = [item.optional_vars for item in node.items if item.optional_vars is not None]
    while found:
        target = found.pop()
        if isinstance(target, ast.Tuple | ast.List):
            found += target.elts
        elif isinstance(target, ast.Attribute | ast.Subscript):
            yield target


def base_of(target: ast.expr) -> ast.expr:
    while isinstance(target, ast.Subscript):
        target = target.value
    return target


def root_of(owner: ast.expr) -> str:
    """The name that a chain of attributes and items begins with; of `self`, with the attribute behind it."""
    chain = ast.unparse(owner).split("[")[0].split("(")[0].split(".")
    return ".".join(chain[: 1 + (chain[0] == "self")])


def place_of(owner: ast.expr, path: tuple[str, ...]) -> str:
    """The class of what belongs to its objects, the function of all else."""
    return path[0] if ast.unparse(owner).startswith("self.") else ".".join(path) or "<module>"


def annotated(function: ast.FunctionDef) -> dict[str, str]:
    """Arguments and locals of a function -> the class that they are said to be, or are made of."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    found = {each.arg: ast.unparse(each.annotation).strip("\"'") for each in arguments if each.annotation is not None}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            called = ast.unparse(node.value.func)
            found.setdefault(node.targets[0].id, called.removesuffix(".create"))
    return found


@cache
def writes() -> dict[str, set[str]]:
    """`Class` or `function: what is written` -> modules, for all that changes after construction."""
    found: dict[str, set[str]] = {}
    for module, tree in modules().items():
        top = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }

        def visit(node: ast.AST, path: tuple[str, ...], kinds: dict[str, str], outside: set[str], where: str) -> None:
            for child in ast.iter_child_nodes(node):
                for what in changed(child, path, kinds, outside):
                    found.setdefault(what, set()).add(where)
                if isinstance(child, ast.FunctionDef):
                    own = kinds | annotated(child)
                    local = {part.id for part in ast.walk(child) if is_stored(part)} | {
                        argument.arg for argument in ast.walk(child.args) if isinstance(argument, ast.arg)
                    }
                    visit(child, (*path, child.name), own, outside - local, where)
                else:
                    inner = (*path, child.name) if isinstance(child, ast.ClassDef) else path
                    visit(child, inner, kinds, outside, where)

        visit(tree, (), {}, top, module)
    return found


def is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def changed(node: ast.AST, path: tuple[str, ...], kinds: dict[str, str], outside: set[str]) -> Iterator[str]:
    """What one statement or call changes: its class, or `function: target`."""
    place = ".".join(path) or "<module>"
    for target in targets(node):
        base = base_of(target)
        if isinstance(base, ast.Name):  # an item: of a module's own container, or of a local one
            if path and base.id in outside:
                yield f"{place}: {base.id}[]"
            continue
        if not isinstance(base, ast.Attribute):
            continue
        owner = base.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            if path[-1] not in CONSTRUCTION:
                yield path[0]
        elif isinstance(owner, ast.Name) and kinds.get(owner.id) in OWN:
            yield kinds[owner.id]
        elif ast.unparse(owner) != "ctx":  # of torch's own functions
            yield f"{place_of(owner, path)}: {root_of(owner)}"
    if isinstance(node, ast.Global):
        yield f"{place}: global {', '.join(node.names)}"
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("setattr", "delattr"):
            yield f"{place}: {called}"
        elif called == "object.__setattr__":
            if path[-1] not in CONSTRUCTION:
                yield f"{place}: {called}"
        elif called.startswith(PROCESS):
            yield f"{place}: {called}"
        elif isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING:
            base = base_of(node.func.value)
            if path and isinstance(base, ast.Name) and base.id in outside:
                yield f"{place}: {called}"


def test_nothing_hidden_changes() -> None:
    """Every write after construction is of a class or a function that the lists above give a reason for."""
    listed = OWN.union(*WRITES.values())
    assert not {what: sorted(where) for what, where in writes().items() if what not in listed}
    assert not listed - writes().keys(), "exceptions that are no longer needed"
