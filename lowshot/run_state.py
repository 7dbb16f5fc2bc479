"""What a run that is under way has so far, in a file beside its record, for when it is killed and the command is given again."""
import contextlib
import io
import json
import os

import numpy as np

from lowshot.files import remove, remove_left_behind, whole
from lowshot.script import log


class RunState:
    """The state of the run that is to write `record`; `key`, a JSON-ready dict, says what it belongs to."""

    def __init__(self, record, key):
        folder, name = os.path.split(os.path.abspath(record))
        self.path = os.path.join(folder, f".{name}.state.npz")
        self.key, self.failed = json.dumps(key, sort_keys=True), False

    def save(self, arrays, **rest):
        """Write the state, or say once that it cannot be written: the run goes on without."""
        try:
            with whole(self.path) as temporary, open(temporary, "wb") as f:
                np.savez(f, key=self.key, rest=json.dumps(rest), **arrays)
        except OSError as e:
            if not self.failed:
                log(f"note: no state was kept, to go on from should this run be killed ({e})")
            self.failed = True

    def load(self, own, check):
        """(arrays, rest) as they were saved; None if there is no whole state of the same run.

        own: dict of arrays, of the types and shapes that those of the state are to have. check(rest) raises some exception
        where that cannot be gone on from.
        """
        if not os.path.isfile(self.path):
            return None
        try:
            with open(self.path, "rb") as f:        # errors of the disk are none of the content
                content = io.BytesIO(f.read())
        except PermissionError as e:
            log(f"note: {e}: this run begins anew")
            return None
        try:
            with np.load(content, allow_pickle=False) as state:
                if str(state["key"]) != self.key:
                    log(f"note: {self.path} is of a run of other arguments or files: this run begins anew")
                    return None
                rest = json.loads(str(state["rest"]))
                arrays = {name: state[name] for name in own}
            for name, a in arrays.items():
                if (a.dtype, a.shape) != (own[name].dtype, own[name].shape):
                    raise ValueError(f"{name} is {a.dtype} {a.shape}")
            check(rest)
        except Exception as e:          # of parsers, in many ways
            log(f"note: {self.path} is damaged ({type(e).__name__}: {e}): this run begins anew")
            return None
        return arrays, rest

    def remove(self):
        with contextlib.suppress(OSError):      # of another user, say: what the run was for is done
            remove(self.path)
            remove_left_behind(self.path)
