import json

import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_data import (
    RunData,
    check_run_data,
    trained_classes,
    write_run_data,
)
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import Split


def _data(path="/photos", given_anew=False, **split):
    return RunData(
        splits={"train": Split(**split)}, path=path, path_as_given="p", given_anew=given_anew
    )


def test_the_images_are_compared_with_those_the_run_began_with(tmp_path):
    folder, said = RunFolder(tmp_path), []
    write_run_data(folder, _data())
    assert json.loads(folder.data_path.read_text())["path_as_given"] == "p"
    assert trained_classes(folder) == ("a", "b")
    check_run_data(folder, _data(), say=said.append)
    check_run_data(folder, _data(path="/moved"), say=said.append)
    assert not said
    for data, problem in (
        (_data(identity="folder:41"), "was started with 'folder:40'"),
        (_data(path="/moved", identity="folder:41"), "was started with 'folder:40'"),
        (_data(classes=("a", "c")), "split 'train' has no 'b' and the run in .* has no 'c'; bring"),
        (_data(times="t2"), "were modified since .* add --data_path=/photos"),
        (_data(path="/moved", times="t2", contents="c2"), "other contents"),
        (_data(given_anew=True, times="t2", contents="c2"), "other contents"),
    ):
        with pytest.raises(UserError, match=problem):
            check_run_data(folder, data, say=said.append)
    assert not said
    check_run_data(folder, _data(path="/moved", times="t2"), say=said.append)
    check_run_data(folder, _data(given_anew=True, times="t2"), say=said.append)
    assert len(said) == 2
    for other in ('{"train": "folder:40"}', '{"splits": {}, "class_names": 5}'):
        folder.data_path.write_text(other)
        with pytest.raises(UserError, match="another version"):
            check_run_data(folder, _data())
