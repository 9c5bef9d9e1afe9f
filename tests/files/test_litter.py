import os

import pytest

from cascaded_diffusion.files.paths import is_litter


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".ipynb_checkpoints", True),
        (".Trash-0", True),
        ("._0001.png", True),
        ("__MACOSX", True),
        ("@eaDir", True),
        ("Thumbs.db", True),
        ("THUMBS.DB", True),
        ("lost+found", True),
        ("0001.png", False),
        ("a.hidden.png", False),
        ("__init__", False),
        ("MACOSX", False),
        ("caf\udce9", False),
    ],
)
def test_hidden_names_and_what_programs_leave_are_litter(name, expected):
    assert is_litter(name) is is_litter(os.fsencode(name)) is expected
