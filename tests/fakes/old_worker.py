"""A serving worker that says that it is of an earlier version."""

from nos_backend.cluster import ServingWorker


class OldWorker(ServingWorker):
    """See above."""

    async def _register_with_scheduler(self):
        facts = self.startup_information["nos"](self)
        self.startup_information["nos"] = lambda _: {**facts, "version": "0.0.1"}
        await super()._register_with_scheduler()
