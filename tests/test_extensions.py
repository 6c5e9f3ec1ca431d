"""Users' own parts by name."""

from pathlib import Path

import pytest

from nova_video.common.errors import InputError
from nova_video.common.extensions import load_extension


def test_a_part_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts_here.py").write_text("class Part:\n    size = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert load_extension("my_parts_here:Part", "head").size == 3
    with pytest.raises(InputError, match=r"head is 'my_parts_here:Other'.*has no Other"):
        load_extension("my_parts_here:Other", "head")


@pytest.mark.parametrize("name", ["Part", "a:", ":b", "a b:c", "", "../x:y"])
def test_another_form_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected module:Name"):
        load_extension(name, "order")


def test_a_missing_module_is_named() -> None:
    with pytest.raises(InputError, match="found no module there_is_no_such_module"):
        load_extension("there_is_no_such_module:Part", "order")
