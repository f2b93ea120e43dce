//! SSE to SSE4.2, AES, SHA, PCLMULQDQ and GFNI in legacy encoding, with the MMX forms of the same mnemonics:
//! all run by the host. A row's section is the manual's page of that mnemonic.

use super::Row;
use super::host_data::{host_rows, select};
use iced_x86::Mnemonic as M;

/// Packed integers and what moves them.
pub const INTEGER_ROWS: &[Row] = host_rows! {
    Movd Movdqa Movdqu Movq Pabsb Pabsd Pabsw Packssdw Packsswb Packusdw Packuswb Paddb Paddd Paddq Paddsb
    Paddsw Paddusb Paddusw Paddw Palignr Pand Pandn Pavgb Pavgw Pblendvb Pblendw Pclmulqdq Pcmpeqb Pcmpeqd
    Pcmpeqq Pcmpeqw Pcmpestri Pcmpestri64 Pcmpestrm Pcmpestrm64 Pcmpgtb Pcmpgtd Pcmpgtq Pcmpgtw Pcmpistri
    Pcmpistrm Pextrb Pextrd Pextrq Pextrw Phaddd Phaddsw Phaddw Phminposuw Phsubd Phsubsw Phsubw Pinsrb
    Pinsrd Pinsrq Pinsrw Pmaddubsw Pmaddwd Pmaxsb Pmaxsd Pmaxsw Pmaxub Pmaxud Pmaxuw Pminsb Pminsd Pminsw
    Pminub Pminud Pminuw Pmovmskb Pmovsxbd Pmovsxbq Pmovsxbw Pmovsxdq Pmovsxwd Pmovsxwq Pmovzxbd Pmovzxbq
    Pmovzxbw Pmovzxdq Pmovzxwd Pmovzxwq Pmuldq Pmulhrsw Pmulhuw Pmulhw Pmulld Pmullw Pmuludq Por Psadbw
    Pshufb Pshufd Pshufhw Pshuflw Psignb Psignd Psignw Pslld Pslldq Psllq Psllw Psrad Psraw Psrld Psrldq
    Psrlq Psrlw Psubb Psubd Psubq Psubsb Psubsw Psubusb Psubusw Psubw Ptest Punpckhbw Punpckhdq Punpckhqdq
    Punpckhwd Punpcklbw Punpckldq Punpcklqdq Punpcklwd Pxor
};

/// Floating point, cryptography and the rest.
pub const ROWS: &[Row] = host_rows! {
    Addpd Addps Addsd Addss Addsubpd Addsubps Aesdec Aesdeclast Aesenc Aesenclast Aesimc Aeskeygenassist
    Andnpd Andnps Andpd Andps Blendpd Blendps Blendvpd Blendvps Cmppd Cmpps Cmpss Comisd Comiss Cvtdq2pd
    Cvtdq2ps Cvtpd2dq Cvtpd2ps Cvtpi2pd Cvtpi2ps Cvtps2dq Cvtps2pd Cvtsd2si Cvtsd2ss Cvtsi2sd Cvtsi2ss
    Cvtss2sd Cvtss2si Cvttpd2dq Cvttps2dq Cvttsd2si Cvttss2si Divpd Divps Divsd Divss Dppd Dpps Extractps
    Gf2p8affineinvqb Gf2p8affineqb Gf2p8mulb Haddpd Haddps Hsubpd Hsubps Insertps Lddqu Maxpd Maxps Maxsd
    Maxss Minpd Minps Minsd Minss Movapd Movaps Movddup Movhlps Movhpd Movhps Movlhps Movlpd Movlps Movmskpd
    Movmskps Movntdq Movntdqa Movntpd Movntps Movshdup Movsldup Movss Movupd Movups Mpsadbw Mulpd Mulps Mulsd
    Mulss Orpd Orps Rcpps Rcpss Roundpd Roundps Roundsd Roundss Rsqrtps Rsqrtss Sha1msg1 Sha1msg2 Sha1nexte
    Sha1rnds4 Sha256msg1 Sha256msg2 Sha256rnds2 Shufpd Shufps Sqrtpd Sqrtps Sqrtsd Sqrtss Subpd Subps Subsd
    Subss Ucomisd Ucomiss Unpckhpd Unpckhps Unpcklpd Unpcklps Xorpd Xorps
};

/// Two mnemonics that string instructions have too.
pub const SHARED_NAME_ROWS: &[Row] = &[
    Row::new(M::Movsd, "MOVSD-Move or Merge Scalar Double Precision Floating-Point Value", select)
        .only(|code| !code.is_string_instruction()),
    Row::new(M::Cmpsd, "CMPSD-Compare Scalar Double Precision Floating-Point Value", select)
        .only(|code| !code.is_string_instruction()),
];
