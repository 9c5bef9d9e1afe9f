"""Training a U-Net for ten steps is training it for five, and five more."""

import pytest

from tests.tiny import smallest_efficient, smallest_sr
from tests.training.test_training import _data, _losses, _records, _train


@pytest.mark.parametrize("make", [smallest_efficient, smallest_sr])
def test_stopping_and_resuming_changes_no_bit(make, tmp_path):
    config = make(
        train__train_steps=10,
        train__warmup_steps=2,
        train__lr_decay="cosine",
        checkpoint__save_every_steps=5,
    )
    assert _train(config, tmp_path / "whole").step == 10

    # The same command, killed at step 5 (as far as the folder can tell), run again.
    class Stop(Exception):
        pass

    def dies_at(last):
        def data_from(start):
            for i, batch in enumerate(_data(config)(start), start=start):
                if i == last:
                    raise Stop
                yield batch

        return data_from

    with pytest.raises(Stop):
        _train(config, tmp_path / "parts", dies_at(8))
    assert max(_losses(tmp_path / "parts")) < 8
    outcome = _train(config, tmp_path / "parts")
    assert (outcome.reason, outcome.step) == ("complete", 10)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert [r["step"] for r in _records(tmp_path / "parts")] == list(range(1, 11))
