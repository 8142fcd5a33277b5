"""Files that are there whole or not at all: publishing, directories, locks."""
