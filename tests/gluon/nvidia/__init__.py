"""`gluon.language.nvidia`: copy engine, barriers and tensor cores."""
