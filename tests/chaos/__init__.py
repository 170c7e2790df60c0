"""A package, since it has a conftest of its own and files whose names others have too."""
