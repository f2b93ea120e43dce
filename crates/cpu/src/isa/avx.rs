//! AVX, AVX2, FMA, F16C and the VEX forms of AES, PCLMULQDQ and GFNI: all run by the host. A row's section is
//! the manual's page of that mnemonic (mostly under the name without V).

use super::Row;
use super::host_data::{host_rows, select};
use iced_x86::Mnemonic as M;

/// Packed integers.
pub const INTEGER_ROWS: &[Row] = host_rows! {
    Vmovdqa Vmovdqu Vpabsb Vpabsd Vpabsw Vpackssdw Vpacksswb Vpackusdw Vpackuswb Vpaddb Vpaddd Vpaddq Vpaddsb
    Vpaddsw Vpaddusb Vpaddusw Vpaddw Vpalignr Vpand Vpandn Vpavgb Vpavgw Vpblendd Vpblendvb Vpblendw
    Vpbroadcastb Vpbroadcastd Vpbroadcastq Vpbroadcastw Vpclmulqdq Vpcmpeqb Vpcmpeqd Vpcmpeqq Vpcmpeqw
    Vpcmpestri Vpcmpestri64 Vpcmpestrm Vpcmpestrm64 Vpcmpgtb Vpcmpgtd Vpcmpgtq Vpcmpgtw Vpcmpistri Vpcmpistrm
    Vperm2f128 Vperm2i128 Vpermd Vpermilpd Vpermilps Vpermpd Vpermps Vpermq Vpextrb Vpextrd Vpextrq Vpextrw
    Vphaddd Vphaddsw Vphaddw Vphminposuw Vphsubd Vphsubsw Vphsubw Vpinsrb Vpinsrd Vpinsrq Vpinsrw Vpmaddubsw
    Vpmaddwd Vpmaxsb Vpmaxsd Vpmaxsw Vpmaxub Vpmaxud Vpmaxuw Vpminsb Vpminsd Vpminsw Vpminub Vpminud Vpminuw
    Vpmovmskb Vpmovsxbd Vpmovsxbq Vpmovsxbw Vpmovsxdq Vpmovsxwd Vpmovsxwq Vpmovzxbd Vpmovzxbq Vpmovzxbw
    Vpmovzxdq Vpmovzxwd Vpmovzxwq Vpmuldq Vpmulhrsw Vpmulhuw Vpmulhw Vpmulld Vpmullw Vpmuludq Vpor Vpsadbw
    Vpshufb Vpshufd Vpshufhw Vpshuflw Vpsignb Vpsignd Vpsignw Vpslld Vpslldq Vpsllq Vpsllvd Vpsllvq Vpsllw
    Vpsrad Vpsravd Vpsraw Vpsrld Vpsrldq Vpsrlq Vpsrlvd Vpsrlvq Vpsrlw Vpsubb Vpsubd Vpsubq Vpsubsb Vpsubsw
    Vpsubusb Vpsubusw Vpsubw Vptest Vpunpckhbw Vpunpckhdq Vpunpckhqdq Vpunpckhwd Vpunpcklbw Vpunpckldq
    Vpunpcklqdq Vpunpcklwd Vpxor
};

/// Floating point and the rest.
pub const ROWS: &[Row] = host_rows! {
    Vaddpd Vaddps Vaddsd Vaddss Vaddsubpd Vaddsubps Vaesdec Vaesdeclast Vaesenc Vaesenclast Vaesimc
    Vaeskeygenassist Vandnpd Vandnps Vandpd Vandps Vblendpd Vblendps Vblendvpd Vblendvps Vbroadcastf128
    Vbroadcasti128 Vbroadcastsd Vbroadcastss Vcmppd Vcmpps Vcmpsd Vcmpss Vcomisd Vcomiss Vcvtdq2pd Vcvtdq2ps
    Vcvtpd2dq Vcvtpd2ps Vcvtph2ps Vcvtps2dq Vcvtps2pd Vcvtps2ph Vcvtsd2si Vcvtsd2ss Vcvtsi2sd Vcvtsi2ss
    Vcvtss2sd Vcvtss2si Vcvttpd2dq Vcvttps2dq Vcvttsd2si Vcvttss2si Vdivpd Vdivps Vdivsd Vdivss Vdppd Vdpps
    Vextractf128 Vextracti128 Vextractps Vgf2p8affineinvqb Vgf2p8affineqb Vgf2p8mulb Vhaddpd Vhaddps Vhsubpd
    Vhsubps Vinsertf128 Vinserti128 Vinsertps Vlddqu Vmaxpd Vmaxps Vmaxsd Vmaxss Vminpd Vminps Vminsd Vminss
    Vmovapd Vmovaps Vmovd Vmovddup Vmovhlps Vmovhpd Vmovhps Vmovlhps Vmovlpd Vmovlps Vmovmskpd Vmovmskps
    Vmovntdq Vmovntdqa Vmovntpd Vmovntps Vmovq Vmovsd Vmovshdup Vmovsldup Vmovss Vmovupd Vmovups Vmpsadbw
    Vmulpd Vmulps Vmulsd Vmulss Vorpd Vorps Vrcpps Vrcpss Vroundpd Vroundps Vroundsd Vroundss Vrsqrtps
    Vrsqrtss Vshufpd Vshufps Vsqrtpd Vsqrtps Vsqrtsd Vsqrtss Vsubpd Vsubps Vsubsd Vsubss Vtestpd Vtestps
    Vucomisd Vucomiss Vunpckhpd Vunpckhps Vunpcklpd Vunpcklps Vxorpd Vxorps
};

/// Fused multiply-add.
pub const FMA_ROWS: &[Row] = host_rows! {
    Vfmadd132pd Vfmadd132ps Vfmadd132sd Vfmadd132ss Vfmadd213pd Vfmadd213ps Vfmadd213sd Vfmadd213ss
    Vfmadd231pd Vfmadd231ps Vfmadd231sd Vfmadd231ss Vfmaddsub132pd Vfmaddsub132ps Vfmaddsub213pd
    Vfmaddsub213ps Vfmaddsub231pd Vfmaddsub231ps Vfmsub132pd Vfmsub132ps Vfmsub132sd Vfmsub132ss Vfmsub213pd
    Vfmsub213ps Vfmsub213sd Vfmsub213ss Vfmsub231pd Vfmsub231ps Vfmsub231sd Vfmsub231ss Vfmsubadd132pd
    Vfmsubadd132ps Vfmsubadd213pd Vfmsubadd213ps Vfmsubadd231pd Vfmsubadd231ps Vfnmadd132pd Vfnmadd132ps
    Vfnmadd132sd Vfnmadd132ss Vfnmadd213pd Vfnmadd213ps Vfnmadd213sd Vfnmadd213ss Vfnmadd231pd Vfnmadd231ps
    Vfnmadd231sd Vfnmadd231ss Vfnmsub132pd Vfnmsub132ps Vfnmsub132sd Vfnmsub132ss Vfnmsub213pd Vfnmsub213ps
    Vfnmsub213sd Vfnmsub213ss Vfnmsub231pd Vfnmsub231ps Vfnmsub231sd Vfnmsub231ss
};
