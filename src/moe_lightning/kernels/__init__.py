"""Operations on tensors: the plain definition of each, and the fast versions."""
