"""What the store refuses, grouped by what the reader would do.

StoreError
├── LevelAbsent      write the level first
├── LevelDamaged     a file is not what its commit says: remove the level, write it again
├── LevelConflict    another level lives under this name
└── DiskFull         make space; every finished shard is kept
"""


class StoreError(Exception):
    """Base of everything the store raises on purpose."""


class LevelAbsent(StoreError):
    """The level has no valid commit, so for readers it does not exist."""


class LevelDamaged(StoreError):
    """A committed file is missing, or of another size or (small files) hash than recorded."""


class LevelConflict(StoreError):
    """The directory holds a level made from something else than what is asked for."""


class LevelBusy(StoreError):
    """Another process is writing the level."""


class DiskFull(StoreError):
    """The file system refused bytes for lack of space.

    Attributes:
        needed: bytes that were to be written.
        free: bytes the file system reports as free.
    """

    def __init__(self, where: str, needed: int, free: int) -> None:
        self.needed, self.free = needed, free
        super().__init__(f"no space left: {where} needs {needed:,} bytes, {free:,} are free")
