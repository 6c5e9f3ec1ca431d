"""Drawn inputs: settings, model configs, recipes and saved states are taken as they are or refused in one line.

No traceback, and nothing that is silently taken for something else. Each draw changes a valid input in one place or
two, since what is wrong everywhere is refused at the first.
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CONFORMANCE
from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.pipeline.loading import outline_autoencoder, outline_transformer
from nova_video.pipeline.records import read_record
from nova_video.pipeline.request import GenerateRequest
from nova_video.pipeline.saved_facts import SavedFacts, check_facts
from nova_video.pipeline.saving import KEY, load_file_facts
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.training.recipe import load_recipe, recipe_toml

DRAWS = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**12, -(10**12), 10**400]),
    st.integers(-100, 5000),
    st.sampled_from([0.5, -0.5, 1e-5, 1e9, 1e308, math.inf, -math.inf, math.nan]),
    st.sampled_from(["", "x", "emoji", "a\nb", "\x1b[31m", "vit_d2w64", "vit_d-1w0", "../../etc/passwd", "9" * 500]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a", "start", "scale"]), inner, max_size=2)
    ),
    max_leaves=6,
)


def places(values: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index of nested objects and lists."""
    found: list[tuple[Any, ...]] = []
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        found += [(*way, key), *places(value, (*way, key))]
    return found


def changed(data: st.DataObject, values: Any) -> Any:
    """A copy of JSON values with one or two entries replaced, removed or added."""
    values = copy.deepcopy(values)
    for _ in range(data.draw(st.integers(1, 2))):
        known = places(values)
        *way, last = data.draw(st.sampled_from(known))
        place = values
        for key in way:
            place = place[key]
        what = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if what == "replace":
            place[last] = data.draw(VALUES)
        elif what == "remove":
            del place[last]
        elif isinstance(place, dict):
            place["unknown"] = data.draw(VALUES)
        else:
            place.append(data.draw(VALUES))
        if not places(values):
            break
    return values


def one_line(error: InputError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1500
    assert re.search(r"expected|lacks|not |cannot|unknown|need|can be made", str(error)), str(error)


@DRAWS
@given(data=st.data())
@pytest.mark.slow
def test_settings_of_a_checkpoint(data: st.DataObject) -> None:
    whole = CheckpointSettings.load(CONFORMANCE.parents[1] / "src/nova_video/models/emoji").as_json()
    values = changed(data, whole)
    try:
        taken = CheckpointSettings.from_json(values)
    except InputError as error:
        one_line(error)
        return
    for name, value in values.get("defaults", {}).items():
        assert getattr(taken.defaults, name) == value  # nothing is taken for something else


@DRAWS
@given(data=st.data())
def test_requests(data: st.DataObject) -> None:
    names = [
        *("height", "width", "num_frames", "seconds", "fps", "num_inference_steps", "num_diffusion_steps", "seed"),
        *("guidance_scale", "guidance_trunc", "guidance_renorm", "image_guidance_scale", "motion_flow", "flow_shift"),
        *("context_frames", "sink_frames", "history_noise", "reanchor_frames", "hold_statistics", "compile", "preset"),
        *("solver", "last_steps", "guided_sets", "fp8", "guidance_every", "num_images_per_prompt", "memory_gb"),
        *("negative_prompt", "output_type", "strength"),
    ]
    values = {name: data.draw(VALUES) for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))}
    try:
        request = GenerateRequest("a whale", **values)
        plan = request.resolve(PIPE.defaults, PIPE.capabilities)
    except InputError as error:
        one_line(error)
        return
    for name in ("height", "width", "fps", "num_inference_steps", "num_diffusion_steps"):
        if values.get(name) is not None:
            assert getattr(plan, name) == values[name]


PIPE = NovaPipeline.from_pretrained(CONFORMANCE / "text-to-video")
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@DRAWS
@given(data=st.data())
@pytest.mark.slow
def test_recipes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A line of a recipe is replaced, doubled or left out."""
    lines = data.draw(st.sampled_from(TEXTS)).splitlines()
    row = data.draw(st.integers(0, len(lines) - 1))
    value = data.draw(VALUES.filter(lambda value: value is not None))
    key = lines[row].split(" = ")[0]
    text = json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan").replace("{", "{ ").replace('":', '" =')
    lines[row] = data.draw(st.sampled_from([f"{key} = {text}", "", f"{lines[row]}\n{lines[row]}", f"{key}x = {text}"]))
    FILE.write_text("\n".join(lines), encoding="utf-8")
    try:
        recipe = load_recipe(FILE)
    except InputError as error:
        one_line(error)
        return
    again = FILE.with_name("again.toml")
    again.write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe or "nan" in text


TEXTS = [path.read_text() for path in RECIPES]
FILE = Path("/dev/null")


@pytest.fixture(scope="module", autouse=True)
def _file(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FILE
    FILE = tmp_path_factory.mktemp("recipes") / "recipe.toml"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    embeds = [torch.randn(5, 32, generator=torch.Generator().manual_seed(0))]
    request = GenerateRequest(
        prompt_embeds=embeds, num_frames=13, seed=0, num_inference_steps=4, num_diffusion_steps=2, output_type="np"
    )
    path = tmp_path_factory.mktemp("states") / "state"
    generation = PIPE.start(request)
    generation.run(lambda _pipe, step, *_: step < 8, show_progress=False)
    generation.save(path)
    return load_file_facts(path)


@DRAWS
@given(data=st.data())
@pytest.mark.slow
def test_saved_states(data: st.DataObject, state: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    """What passes is as it was saved, but for what says nothing of the result."""
    facts, tensors = state
    values = changed(data, facts)
    try:
        taken = read_record(SavedFacts, values, "its record")
        check_facts(taken, tensors, PIPE)
    except InputError as error:
        one_line(error)
        return
    assert taken.plan.grid == tuple(facts["plan"]["grid"])
    assert (taken.done, taken.step, taken.passes) == (facts["done"], facts["step"], facts["passes"])
    assert KEY


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_configs_of_models(part: str, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No model is made of what it cannot be, and nothing hangs; a model that is made has the config's values."""
    source = CONFORMANCE / "text-to-video" / part
    folder = tmp_path_factory.mktemp(part)
    (folder / "diffusion_pytorch_model.safetensors").symlink_to(source / "diffusion_pytorch_model.safetensors")
    whole = json.loads((source / "config.json").read_text())
    outline = outline_transformer if part == "transformer" else outline_autoencoder

    @settings(DRAWS, max_examples=count)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        values = changed(data, whole)
        (folder / "config.json").write_text(json.dumps(values))
        try:
            model = outline(folder)
        except InputError as error:
            one_line(error)
            return
        for name, value in values.items():
            if name in model.config and not name.startswith("_") and name != "image_size":
                assert json.loads(json.dumps(model.config[name], default=list)) == value

    check()
