"""`fst export`: model directories -> the formats of other engines, checked by these engines."""
