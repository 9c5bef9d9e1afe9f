"""`main --replay`: a step that ended a training, done again."""

import numpy as np

from cascaded_diffusion.commands.train_stage import prepared
from cascaded_diffusion.data.loader import iterate
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.json_files import read_record
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import nonfinite
from cascaded_diffusion.training.replay import replay


def replay_step(path: AnyPath, data_path: str | None) -> int:
    """Does the step of RUN/nonfinite/STEP again, and prints what it gives.

    Returns 0 if it gives what was recorded, else 1. Raises UserError if it cannot be done again.
    """
    path = path.resolve()
    folder, about = RunFolder(path.parent.parent, flag="replay"), path / "about.json"
    if not about.is_file():
        raise UserError(
            f"--replay={path}: no step is kept there; expected RUN/nonfinite/STEP, which a training"
            " writes that ends because its steps are not finite"
        )
    recorded = read_record(about, {"step": int, "values": dict, "leaves": list})
    step = recorded["step"]
    given = prepared(folder.read_config(), data_path)
    batches = iterate(given.stream, given.source, given.config.data, start_step=step - 1)
    try:
        records = mesh_lib.global_batch(next(batches), given.mesh)
        numbers = batches.records_of(step - 1, given.config.train.batch_size)
    finally:
        batches.close()
    found = replay(given.config, folder, step, records, mesh=given.mesh)
    name = given.config.stage.name
    if nonfinite.are_finite(found.values):
        print(f"{name}: step {step} is finite here: {found.values}")
    else:
        print(f"{name}: step {step} again: {nonfinite.described(found.values, found.leaves)}")
    if found.leaves:
        print(f"gradients that are not finite: {', '.join(found.leaves)}")
    if found.rows:
        rows = ", ".join(f"{row} (record {numbers[row]})" for row in found.rows)
        print(f"rows whose loss is not finite: {rows}")
    # Other devices round otherwise.
    before = {name: float(value) for name, value in recorded["values"].items()}
    same = before.keys() == found.values.keys() and all(
        np.isclose(value, before[name], rtol=1e-3, equal_nan=True)
        for name, value in found.values.items()
    )
    print("the same as recorded" if same else f"recorded: {before}")
    return 0 if same else 1
