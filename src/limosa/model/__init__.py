"""Nouns of live migration: frozen values without I/O.

Everything that is stored in a file or said on a wire is one of these structs or is made of them. They are
``msgspec`` structs: decoding checks every constraint written in the types and names the place of a fault, and a
value that exists is therefore valid. Units stand in the names. Nothing here imports any other room.
"""
