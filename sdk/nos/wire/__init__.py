"""The wire format of `nos.v1`: the part of the SDK that the backend shares."""
