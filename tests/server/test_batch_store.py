"""Records and contents against a plain model, under any order of calls, restarts and kills."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from service_desk import without_power_cuts

from moe_lightning.server.batches import BatchLimits, transitions
from moe_lightning.server.batches.disk import new_batch_id, new_file_id
from moe_lightning.server.batches.objects import Batch, BatchRecord, FileObject
from moe_lightning.server.batches.run import Tally
from moe_lightning.server.batches.shelf import Shelf
from moe_lightning.server.errors import HttpError

KEPT = 4
LIMITS = BatchLimits(files=12, open_batches=3, batches=KEPT)


class ShelfMachine(RuleBasedStateMachine):
    """`self.files` and `self.batches` are what should be there, oldest first."""

    files, batches = Bundle("files"), Bundle("batches")

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        without_power_cuts(self.patch)
        self.root = Path(tempfile.mkdtemp())
        self.directory = self.root / "0"
        self.shelf = Shelf(self.directory)
        self.contents, self.records, self.restarts = {}, {}, 0

    def teardown(self):
        self.shelf.close()
        shutil.rmtree(self.root)
        self.patch.undo()

    @rule(target=files, content=st.binary(max_size=5), interrupted=st.sampled_from(["", "before", "between"]))
    def upload(self, content, interrupted):
        file = FileObject(id=new_file_id(), bytes=len(content), created_at=1, filename="a", purpose="batch")
        try:
            self.shelf.require_room(LIMITS)
        except HttpError:
            assert len(self.contents) >= LIMITS.files
            return multiple()
        assert len(self.contents) < LIMITS.files
        self.shelf.disk.pending(file.id).write_bytes(content)
        if interrupted == "before":
            self.kill()
            return multiple()
        if interrupted == "between":
            self.shelf.store.add_file(file)
            self.kill()
        else:
            self.shelf.publish(file)
        self.contents[file.id] = content
        return file.id

    @rule(file_id=files, interrupted=st.sampled_from(["", "before", "between"]))
    def delete(self, file_id, interrupted):
        file = self.shelf.store.file(file_id)
        assert (file is None) == (file_id not in self.contents)
        if file is None:
            return
        if any(r.is_open and r.batch.input_file_id == file_id for r in self.records.values()):
            with pytest.raises(HttpError, match="reads the file"):
                self.shelf.delete(file)
            return
        if interrupted == "before":
            self.shelf.disk.retire(file_id)
            self.kill()
            return
        if interrupted == "between":
            self.shelf.disk.retire(file_id)
            self.shelf.store.remove_file(file_id)
            self.kill()
        else:
            self.shelf.delete(file)
        del self.contents[file_id]

    @rule(target=batches, file_id=files)
    def create(self, file_id):
        batch = Batch(
            id=new_batch_id(), endpoint="/v1/completions", input_file_id=file_id, completion_window="24h",
            created_at=1, expires_at=2,
        )  # fmt: skip
        record = BatchRecord(
            batch=batch, answers_id=new_file_id(), failures_id=new_file_id(), line_bytes=9, body_depth=9
        )
        is_full = sum(r.is_open for r in self.records.values()) >= LIMITS.open_batches
        try:
            self.shelf.add_batch(record, LIMITS)
        except HttpError as error:
            why = {404: file_id not in self.contents, 429: is_full, 400: len(self.contents) >= LIMITS.files}
            assert why[error.status]
            return multiple()
        assert file_id in self.contents and not is_full
        self.records[batch.id] = record
        over = len(self.records) - KEPT
        oldest = [i for n, (i, r) in enumerate(self.records.items()) if not r.is_open and n < over]
        for batch_id in oldest:
            del self.records[batch_id]
        return batch.id

    @rule(batch_id=batches, tally=st.builds(Tally, st.integers(0, 9), st.integers(0, 9)))
    def advance(self, batch_id, tally):
        self._change(batch_id, transitions.in_progress(3, 9))
        self._change(batch_id, transitions.with_tally(tally))

    @rule(batch_id=batches)
    def cancel(self, batch_id):
        record = self.records.get(batch_id)
        if record is not None and record.batch.status not in ("validating", "in_progress", "cancelling"):
            with pytest.raises(HttpError, match="can be cancelled"):
                self.shelf.store.change(batch_id, transitions.cancelling(4))
        else:
            self._change(batch_id, transitions.cancelling(4))

    @rule(batch_id=consumes(batches), status=st.sampled_from(["completed", "failed", "expired"]))
    def end(self, batch_id, status):
        record = self.records.get(batch_id)
        if record is None or not record.is_open:
            return
        self.shelf.disk.content(record.answers_id).write_bytes(b"{}\n")
        files = transitions.output_files(record, (3, None), 5)
        self._change(batch_id, transitions.ended(status, 5, files, Tally(1), ()), files)
        self.contents[record.answers_id] = b"{}\n"

    @rule()
    def restart(self):
        self.shelf.close()
        self.shelf = Shelf(self.directory)

    @rule()
    def kill(self):
        """What is on disk now is what a killed process leaves."""
        self.restarts += 1
        left = self.root / str(self.restarts)
        shutil.copytree(self.directory, left)
        self.shelf.close()
        self.directory, self.shelf = left, Shelf(left)

    @rule(limit=st.integers(1, 4), newest_first=st.booleans())
    def list_files(self, limit, newest_first):
        found, after, has_more = [], None, True
        while has_more:
            page, has_more = self.shelf.store.files(after, limit, newest_first=newest_first)
            assert len(page) <= limit and (page or not found)
            found += [file.id for file in page]
            after = found[-1] if found else None
        assert found == list(self.contents)[:: -1 if newest_first else 1]

    @invariant()
    def all_is_as_it_should_be(self):
        batches, _ = self.shelf.store.batches(None, 100)
        assert batches == list(self.records.values())[::-1]
        assert self.shelf.store.open_batches() == [r for r in self.records.values() if r.is_open]
        assert self.shelf.store.stored() == (len(self.contents), sum(map(len, self.contents.values())))
        for file_id, content in self.contents.items():
            assert self.shelf.disk.content(file_id).read_bytes() == content
        assert not list((self.directory / "pending").iterdir())

    def _change(self, batch_id, edit, files=()):
        if batch_id in self.records:
            self.records[batch_id] = edit(self.records[batch_id])
            assert self.shelf.store.change(batch_id, edit, files) == self.records[batch_id]


TestShelf = ShelfMachine.TestCase
TestShelf.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
