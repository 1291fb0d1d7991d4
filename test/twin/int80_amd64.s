#include "textflag.h"

// func int80raw(n uint32) int32
// The system call number n of the ABI of i386, without arguments.
TEXT ·int80raw(SB), NOSPLIT, $0-12
	MOVL n+0(FP), AX
	XORL BX, BX
	XORL CX, CX
	XORL DX, DX
	XORL SI, SI
	XORL DI, DI
	INT  $0x80
	MOVL AX, ret+8(FP)
	RET
